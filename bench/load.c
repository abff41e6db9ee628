/*
 * The client of the benchmarks: one thread, one core, bounded in time.
 *
 *   load latency  PORT SECONDS   one connection, 64 octets there and back
 *   load messages PORT SECONDS   64 connections, 1 KiB there and back, one outstanding on each
 *   load bulk     PORT SECONDS   4 connections that write and read without a pause
 *   load udp      PORT SECONDS   64 octets, up to 64 datagrams outstanding
 *   load idle     PORT COUNT     COUNT connections, each used once, held until stdin ends
 *   load cold     PORT           connect, send one octet, wait for it (or for the end)
 *
 * The server is on loopback, or at the IPv4 address that comes after SECONDS or COUNT.
 *
 * Prints "name=value" words on one line.  What comes back is compared with what was sent; any
 * difference ends the run with exit status 1.  It is written in C so that the server is what
 * limits, also when the server is written in C.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum {
	SMALL = 64,
	MESSAGE = 1024,
	CONNECTIONS = 64,
	STREAMS = 4,
	CHUNK = 256 * 1024,
	CHECKED = 4 * 1024 * 1024, /* octets of each bulk stream that are compared */
	WINDOW = 64,
	PATTERN = 251, /* a prime: no power of two is a multiple, so a shifted copy is noticed */
	SAMPLES = 1 << 20,
	PATIENCE = 10, /* seconds after which a server that does not answer has failed */
};

static unsigned char pattern[CHUNK + PATTERN];
static struct sockaddr_in server = { .sin_family = AF_INET };

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t after(double seconds)
{
	return now_ns() + (uint64_t)(seconds * 1e9);
}

static int connected(int type)
{
	int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0), on = 1;
	struct timeval patience = { .tv_sec = PATIENCE };

	if (fd < 0)
		err(1, "socket");
	if (connect(fd, (struct sockaddr *)&server, sizeof server) < 0)
		err(1, "connect");
	if (type == SOCK_STREAM)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	return fd;
}

static void send_all(int fd, const void *data, size_t size)
{
	if (send(fd, data, size, MSG_NOSIGNAL) != (ssize_t)size)
		err(1, "send");
}

static void receive_all(int fd, void *data, size_t size)
{
	ssize_t got = recv(fd, data, size, MSG_WAITALL);

	if (got != (ssize_t)size)
		errx(1, "expected %zu octets, got %zd: %s", size, got, strerror(errno));
}

static void must_equal(const void *got, const void *sent, size_t size)
{
	if (memcmp(got, sent, size) != 0)
		errx(1, "what came back is not what was sent");
}

static int epoll_of(const int *fds, int count, unsigned events)
{
	int epoll = epoll_create1(EPOLL_CLOEXEC);

	for (int i = 0; i < count; i++) {
		struct epoll_event event = { .events = events, .data.u32 = i };

		if (epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event) < 0)
			err(1, "epoll_ctl");
	}
	return epoll;
}

/* ---- latency ---- */

static int ascending(const void *left, const void *right)
{
	uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;

	return (a > b) - (a < b);
}

static void latency(double seconds)
{
	static uint32_t samples[SAMPLES];
	unsigned char back[SMALL];
	int fd = connected(SOCK_STREAM), count = 0;
	uint64_t warm = after(seconds / 5), end = after(seconds), start, stop;

	do {
		start = now_ns();
		send_all(fd, pattern + count % PATTERN, SMALL);
		receive_all(fd, back, SMALL);
		stop = now_ns();
		must_equal(back, pattern + count % PATTERN, SMALL);
		if (stop > warm)
			samples[count++] = (uint32_t)(stop - start);
	} while (stop < end && count < SAMPLES);
	qsort(samples, count, sizeof *samples, ascending);
	printf("median_us=%.2f p99_us=%.2f\n", samples[count / 2] / 1e3, samples[count / 100 * 99] / 1e3);
}

/* ---- messages ---- */

struct exchange {
	size_t received;
	unsigned turn; /* where in the pattern this message starts: each differs from the last */
};

/* True when a whole message came back, and the next one is on its way. */
static int exchange(int fd, struct exchange *x)
{
	unsigned char back[MESSAGE];
	ssize_t got = recv(fd, back, MESSAGE - x->received, MSG_DONTWAIT);

	if (got <= 0)
		errx(1, "a connection ended: %s", got ? strerror(errno) : "EOF");
	must_equal(back, pattern + x->turn + x->received, got);
	x->received += got;
	if (x->received < MESSAGE)
		return 0;
	x->received = 0;
	x->turn = (x->turn + 1) % PATTERN;
	send_all(fd, pattern + x->turn, MESSAGE);
	return 1;
}

static void messages(double seconds)
{
	struct exchange exchanges[CONNECTIONS] = { 0 };
	struct epoll_event events[CONNECTIONS];
	int fds[CONNECTIONS], epoll;
	uint64_t done = 0, now, start = after(seconds / 5), end = after(seconds);

	for (int i = 0; i < CONNECTIONS; i++)
		fds[i] = connected(SOCK_STREAM);
	epoll = epoll_of(fds, CONNECTIONS, EPOLLIN);
	for (int i = 0; i < CONNECTIONS; i++)
		send_all(fds[i], pattern, MESSAGE);
	while ((now = now_ns()) < end) {
		int ready = epoll_wait(epoll, events, CONNECTIONS, PATIENCE * 1000);

		if (ready <= 0)
			errx(1, "no answer for %d s", PATIENCE);
		for (int i = 0; i < ready; i++) {
			int which = events[i].data.u32;

			done += exchange(fds[which], &exchanges[which]) && now > start;
		}
	}
	printf("per_second=%.0f\n", done / ((now_ns() - start) / 1e9));
}

/* ---- bulk ---- */

struct stream {
	uint64_t sent, received;
};

static void send_more(int fd, struct stream *s)
{
	ssize_t sent = send(fd, pattern + s->sent % PATTERN, CHUNK, MSG_NOSIGNAL | MSG_DONTWAIT);

	if (sent < 0 && errno != EAGAIN)
		err(1, "send");
	s->sent += sent > 0 ? sent : 0;
}

/* After the part that is compared, MSG_TRUNC drops what came without copying it: the client must
 * not be what limits.  Lengths are still counted to the last octet. */
static ssize_t receive_more(int fd, struct stream *s)
{
	static unsigned char back[CHUNK];
	int compare = s->received < CHECKED;
	ssize_t got = recv(fd, back, CHUNK, MSG_DONTWAIT | (compare ? 0 : MSG_TRUNC));

	if (got < 0 && errno == EAGAIN)
		return -1;
	if (got < 0)
		err(1, "recv");
	if (compare)
		must_equal(back, pattern + s->received % PATTERN, got);
	s->received += got;
	return got;
}

/* Half-close, and read what is still under way: not an octet may be missing. */
static void finish(int fd, struct stream *s)
{
	struct epoll_event event;
	int epoll = epoll_of(&fd, 1, EPOLLIN);

	shutdown(fd, SHUT_WR);
	while (receive_more(fd, s) != 0)
		if (epoll_wait(epoll, &event, 1, PATIENCE * 1000) <= 0)
			errx(1, "no end of the stream for %d s", PATIENCE);
	if (s->received != s->sent)
		errx(1, "sent %ju octets, got %ju", (uintmax_t)s->sent, (uintmax_t)s->received);
	close(epoll);
}

static uint64_t total(const struct stream *streams)
{
	uint64_t sum = 0;

	for (int i = 0; i < STREAMS; i++)
		sum += streams[i].received;
	return sum;
}

static void bulk(double seconds)
{
	struct stream streams[STREAMS] = { 0 };
	struct epoll_event events[STREAMS];
	int fds[STREAMS], epoll;
	uint64_t before = 0, now, start = after(seconds / 5), end = after(seconds);

	for (int i = 0; i < STREAMS; i++)
		fds[i] = connected(SOCK_STREAM);
	epoll = epoll_of(fds, STREAMS, EPOLLIN | EPOLLOUT);
	while ((now = now_ns()) < end) {
		int ready = epoll_wait(epoll, events, STREAMS, PATIENCE * 1000);

		if (ready <= 0)
			errx(1, "no answer for %d s", PATIENCE);
		if (before == 0 && now > start) {
			start = now;
			before = total(streams);
		}
		for (int i = 0; i < ready; i++) {
			int which = events[i].data.u32;

			if (events[i].events & EPOLLIN && receive_more(fds[which], &streams[which]) == 0)
				errx(1, "a stream ended early");
			if (events[i].events & EPOLLOUT)
				send_more(fds[which], &streams[which]);
		}
	}
	before = total(streams) - before;
	now -= start;
	for (int i = 0; i < STREAMS; i++)
		finish(fds[i], &streams[i]);
	printf("mb_per_second=%.1f\n", before / 1e6 / (now / 1e9));
}

/* ---- udp ---- */

static struct mmsghdr batch[WINDOW];
static struct iovec parts[WINDOW];
static unsigned char datagrams[WINDOW][SMALL * 2]; /* room to notice one that grew */

static int send_datagrams(int fd, int count, uint64_t *sequence)
{
	for (int i = 0; i < count; i++) {
		parts[i] = (struct iovec){ datagrams[i], SMALL };
		memcpy(datagrams[i], pattern + *sequence % PATTERN, SMALL);
		memcpy(datagrams[i], sequence, sizeof *sequence);
		++*sequence;
	}
	return sendmmsg(fd, batch, count, 0);
}

static int receive_datagrams(int fd)
{
	uint64_t sequence;
	int got;

	for (int i = 0; i < WINDOW; i++)
		parts[i].iov_len = sizeof datagrams[i];
	got = recvmmsg(fd, batch, WINDOW, MSG_WAITFORONE, NULL);
	for (int i = 0; i < got; i++) {
		if (batch[i].msg_len != SMALL)
			errx(1, "a datagram of %d octets came back with %u", SMALL, batch[i].msg_len);
		memcpy(&sequence, datagrams[i], sizeof sequence);
		must_equal(datagrams[i] + sizeof sequence,
			   pattern + sequence % PATTERN + sizeof sequence, SMALL - sizeof sequence);
	}
	return got;
}

static void udp(double seconds)
{
	int fd = connected(SOCK_DGRAM), outstanding = 0;
	struct timeval patience = { .tv_usec = 50000 };
	uint64_t sequence = 0, done = 0, lost = 0, now, start = after(seconds / 5), end = after(seconds);

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	for (int i = 0; i < WINDOW; i++)
		batch[i].msg_hdr = (struct msghdr){ .msg_iov = &parts[i], .msg_iovlen = 1 };
	while ((now = now_ns()) < end) {
		int sent = send_datagrams(fd, WINDOW - outstanding, &sequence), got;

		outstanding += sent > 0 ? sent : 0;
		got = receive_datagrams(fd);
		if (got < 0) { /* what is outstanding was dropped on the way: legal, but counted */
			lost += outstanding;
			outstanding = 0;
			continue;
		}
		outstanding -= got;
		done += now > start ? got : 0;
	}
	if (done == 0)
		errx(1, "no datagram came back");
	printf("per_second=%.0f lost=%ju\n", done / ((now_ns() - start) / 1e9), (uintmax_t)lost);
}

/* ---- idle and cold ---- */

static void idle(double count)
{
	struct rlimit files;
	char octet = 'i';

	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	for (int i = 0; i < (int)count; i++) {
		int fd = connected(SOCK_STREAM);

		send_all(fd, &octet, 1); /* a connection that was never served may not exist yet */
		receive_all(fd, &octet, 1);
	}
	printf("open=%d\n", (int)count);
	fflush(stdout);
	while (read(STDIN_FILENO, &octet, 1) > 0)
		;
}

/* The end counts as an answer, so that a program that only starts and exits can be measured. */
static void cold(double unused)
{
	uint64_t start = now_ns();
	int fd = connected(SOCK_STREAM);
	char octet = 'c';
	ssize_t got;

	(void)unused;
	send_all(fd, &octet, 1);
	got = recv(fd, &octet, 1, 0);
	if (got < 0 && errno != ECONNRESET)
		err(1, "recv");
	printf("us=%.1f echoed=%d\n", (now_ns() - start) / 1e3, got == 1);
}

int main(int argc, char **argv)
{
	static const struct { const char *name; void (*run)(double); } modes[] = {
		{ "latency", latency }, { "messages", messages }, { "bulk", bulk },
		{ "udp", udp }, { "idle", idle }, { "cold", cold },
	};

	if (argc < 3)
		errx(2, "usage: load latency|messages|bulk|udp|idle|cold PORT [SECONDS|COUNT [ADDRESS]]");
	server.sin_port = htons(atoi(argv[2]));
	server.sin_addr.s_addr = argc > 4 ? inet_addr(argv[4]) : htonl(INADDR_LOOPBACK);
	for (size_t i = 0; i < sizeof pattern; i++)
		pattern[i] = i % PATTERN;
	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
		if (strcmp(argv[1], modes[i].name) == 0) {
			modes[i].run(argc > 3 ? atof(argv[3]) : 1);
			return 0;
		}
	}
	errx(2, "no such mode: %s", argv[1]);
}
