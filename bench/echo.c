/*
 * The limit: what a user-space echo on one core can do when no interpreter is in the way.
 *
 * Plain C, one thread, level-triggered epoll, sockets inherited as LISTEN_FDS says.  It keeps the
 * rules that echo-appliance keeps, so that the comparison is fair: memory is bounded (one shared
 * buffer, and one private buffer for a client that does not read), a client that does not read is
 * not read from, and a datagram is answered from the address that it was sent to.  It leaves out
 * everything else: limits, time-outs, metrics, notification.
 *
 * Never used outside bench/.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* As the appliance's READ_SIZE, so that both may hold as much per connection. */
enum { READ_SIZE = 384 * 1024 };
enum { FIRST_FD = 3, BATCH = 64, MAX_FDS = 1 << 16 };

enum kind { CLOSED, LISTENER, DATAGRAM, STREAM };

/* What is known of one descriptor.  `unsent` is what the client would not take yet. */
struct endpoint {
	enum kind kind;
	char *unsent;
	size_t start, end;
};

static struct endpoint endpoints[MAX_FDS];
static char shared[READ_SIZE];
static int epoll;

static void watch(int operation, int fd, unsigned events)
{
	struct epoll_event event = { .events = events, .data.fd = fd };

	if (epoll_ctl(epoll, operation, fd, &event) < 0)
		err(1, "epoll_ctl");
}

static void end_stream(int fd)
{
	free(endpoints[fd].unsent);
	endpoints[fd] = (struct endpoint){ 0 };
	close(fd);
}

static void accept_streams(int listener)
{
	int fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		if (fd >= MAX_FDS) {
			close(fd);
			continue;
		}
		endpoints[fd].kind = STREAM;
		watch(EPOLL_CTL_ADD, fd, EPOLLIN);
	}
}

/* Octets that the socket took: 0 when it takes none now, -1 when the connection is gone. */
static ssize_t send_some(int fd, const char *data, size_t size)
{
	ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);

	return sent < 0 && errno == EAGAIN ? 0 : sent;
}

static void keep_unsent(int fd, const char *data, size_t size)
{
	struct endpoint *endpoint = &endpoints[fd];

	endpoint->unsent = malloc(size);
	if (!endpoint->unsent)
		err(1, "malloc");
	memcpy(endpoint->unsent, data, size);
	endpoint->start = 0;
	endpoint->end = size;
	watch(EPOLL_CTL_MOD, fd, EPOLLOUT);
}

static void echo_stream(int fd)
{
	ssize_t got = recv(fd, shared, sizeof shared, 0);
	ssize_t sent;

	if (got < 0 && errno == EAGAIN)
		return;
	if (got <= 0 || (sent = send_some(fd, shared, got)) < 0)
		end_stream(fd);
	else if (sent < got)
		keep_unsent(fd, shared + sent, got - sent);
}

static void send_unsent(int fd)
{
	struct endpoint *endpoint = &endpoints[fd];
	ssize_t sent = send_some(fd, endpoint->unsent + endpoint->start,
				 endpoint->end - endpoint->start);

	if (sent < 0) {
		end_stream(fd);
		return;
	}
	endpoint->start += sent;
	if (endpoint->start == endpoint->end) {
		free(endpoint->unsent);
		endpoint->unsent = NULL;
		watch(EPOLL_CTL_MOD, fd, EPOLLIN);
	}
}

/* The destination becomes the source: IP(V6)_PKTINFO is the one cmsg that does both.  The original
 * destination's port (IP_ORIGDSTADDR) comes along and is read, as in the appliance, but cannot be
 * sent.  Returns the octets of control data for the reply, made in place. */
static size_t turn_control(struct msghdr *message)
{
	static union { char room[CMSG_SPACE(sizeof(struct in6_pktinfo))]; struct cmsghdr align; } out;
	struct cmsghdr *reply = &out.align;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO) {
			struct in_pktinfo info;

			memcpy(&info, CMSG_DATA(c), sizeof info);
			info.ipi_spec_dst = info.ipi_addr;
			info.ipi_ifindex = 0;
			memcpy(CMSG_DATA(reply), &info, sizeof info);
		} else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_PKTINFO) {
			memcpy(CMSG_DATA(reply), CMSG_DATA(c), sizeof(struct in6_pktinfo));
		} else {
			continue;
		}
		reply->cmsg_len = c->cmsg_len;
		reply->cmsg_level = c->cmsg_level;
		reply->cmsg_type = c->cmsg_type;
		message->msg_control = &out;
		return CMSG_ALIGN(reply->cmsg_len);
	}
	return 0;
}

static void echo_datagrams(int fd)
{
	static char control[512] __attribute__((aligned(8)));
	struct sockaddr_storage peer;
	struct iovec data = { .iov_base = shared };

	for (int i = 0; i < BATCH; i++) {
		struct msghdr message = { &peer, sizeof peer, &data, 1, control, sizeof control, 0 };
		ssize_t got;

		data.iov_len = sizeof shared;
		got = recvmsg(fd, &message, 0);
		if (got < 0)
			return;
		data.iov_len = got;
		message.msg_controllen = turn_control(&message);
		message.msg_flags = 0;
		sendmsg(fd, &message, MSG_NOSIGNAL); /* a full buffer drops, as UDP does */
	}
}

static void inherit(int fd)
{
	int type, on = 1;
	socklen_t size = sizeof type;

	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0)
		err(1, "descriptor %d", fd);
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	if (type == SOCK_DGRAM) { /* each refuses the other family: let it */
		setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof on);
		setsockopt(fd, IPPROTO_IP, IP_RECVORIGDSTADDR, &on, sizeof on);
		setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on);
		setsockopt(fd, IPPROTO_IPV6, IPV6_RECVORIGDSTADDR, &on, sizeof on);
	}
	endpoints[fd].kind = type == SOCK_DGRAM ? DATAGRAM : LISTENER;
	watch(EPOLL_CTL_ADD, fd, EPOLLIN);
}

static void serve(int fd, unsigned events)
{
	switch (endpoints[fd].kind) {
	case LISTENER: accept_streams(fd); break;
	case DATAGRAM: echo_datagrams(fd); break;
	case STREAM: (events & EPOLLOUT ? send_unsent : echo_stream)(fd); break;
	case CLOSED: break;
	}
}

int main(void)
{
	const char *count = getenv("LISTEN_FDS");
	struct epoll_event events[BATCH];

	if (!count || atoi(count) < 1)
		errx(2, "no sockets inherited: set LISTEN_FDS, or start it with systemd-socket-activate");
	epoll = epoll_create1(EPOLL_CLOEXEC);
	if (epoll < 0)
		err(1, "epoll_create1");
	for (int fd = FIRST_FD; fd < FIRST_FD + atoi(count); fd++)
		inherit(fd);
	for (;;) {
		int ready = epoll_wait(epoll, events, BATCH, -1);

		for (int i = 0; i < ready; i++)
			serve(events[i].data.fd, events[i].events);
	}
}
