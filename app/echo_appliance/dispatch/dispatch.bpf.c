// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Steers connections and datagrams for whole prefixes and port ranges to registered sockets.
 * Runs (as BPF_PROG_TYPE_SK_LOOKUP, Linux 5.9) when a packet finds no established TCP
 * connection and no connected UDP socket.  Never allocates, never looks at payload.
 *
 * Which binding wins, model.py says in Python; tests compare the two.
 *
 * How the cost stays independent of the number of bindings: a range of ports is cut into
 * aligned blocks of 2^n ports, which are prefixes of a port.  Keys of one address, or of all
 * ports, end in the port: one LPM lookup finds the smallest block of this very address, or else
 * the longest prefix.  Other keys begin with the block: a packet's port lies in one of each of
 * the 16 sizes, and one lookup per size that is in use finds, for it, the longest prefix.  Blocks
 * that bindings of one prefix share are settled when they are written.  layout.py numbers all this.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum { AF_INET = 2, AF_INET6 = 10, IPPROTO_TCP = 6, IPPROTO_UDP = 17 };

#define SIZES 16 /* blocks of 2^0 to 2^15 ports; those of 2^16 need no size */
#define KINDS 4 /* (TCP, UDP) x (IPv4, IPv6) */
#define DESTINATIONS 1024 /* labels */
#define SLOTS 32 /* sockets of one label and kind */
#define FIXED_BITS 32 /* of a key, before its address: always compared whole */
#define PORT_LAST (1 << 30) /* in sizes: there are keys that end in the port */
#define ON_MISS_PASS 1 /* flag: without a live socket: normal lookup instead of a drop */
#define SPARE_LOCAL 2 /* flag: leave their ports to local clients */

/* The trie's key begins at bits, which says how many bits of octets count: 8 of kind, 24 of block
 * (2 * its first port + the number of its ports, or 0 where the port is at the end), address, port.
 */
struct key { __u32 index /* of other maps */, bits; __be64 octets[3]; };

struct binding {
	__u64 hits;
	__u32 destination;
	__u16 low, high; /* of the range, which may have more blocks */
	__u8 prefix, flags;
	__u8 zero[6];
};

struct destination {
	char label[64];
	__u32 slots; /* how many are looked at, 8 bits for each kind; a slot may be empty */
	__u32 zero;
};

struct counters { __u64 lookups, misses, errors; };

struct settings {
	__u32 layout;
	__u16 local_low, local_high; /* ip_local_port_range: where local clients get their ports */
	/* Bit n: blocks of 2^n ports are in use for IPv4 (or were, a moment ago); 32 + n: for IPv6. */
	__u64 tcp_sizes, udp_sizes;
	__u8 source[32]; /* digest of the file in force, for load-bindings */
	__u32 capacity; /* of each trie */
};

struct explained { struct binding binding; __u32 found, zero; };

struct trie {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(key_size, 28); /* clang leaves the type of an inner map's key out */
	__uint(value_size, sizeof(struct binding));
};

/* One entry: the trie in force.  Replacing all bindings is replacing this pointer. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct trie);
} bindings SEC(".maps");

#define MAP(name, kind, entries, element) \
	struct { \
		__uint(type, BPF_MAP_TYPE_##kind); __uint(max_entries, entries); \
		__type(key, __u32); __type(value, element); \
	} name SEC(".maps")

MAP(destinations, ARRAY, DESTINATIONS, struct destination);
MAP(sockets, SOCKMAP, DESTINATIONS * KINDS * SLOTS, __u64); /* a closed socket leaves by itself */
MAP(counters, PERCPU_ARRAY, DESTINATIONS * KINDS, struct counters);

/* Maps of one entry, too, but their address is known when the program is loaded. */
static volatile struct settings settings SEC(".data.settings");
static volatile struct explained explained SEC(".data.explained");

/* What makes a binding win: its prefix, then how narrow it is, then how high. */
static __always_inline __u64 rank(const struct binding *one)
{
	__u16 narrowness = ~(one->high - one->low);

	return (__u64)one->prefix << 32 | (__u64)narrowness << 16 | one->low;
}

static __always_inline __be64 be64(__u32 high, __u32 low)
{
	return bpf_cpu_to_be64((__u64)high << 32 | low);
}

static __always_inline struct binding *find(void *trie, struct key *key, __u32 kind, __u32 address,
					    __u64 port, __u64 sizes)
{
	struct binding *best = NULL, *found;

	if (sizes & PORT_LAST) {
		key->octets[0] = be64(kind, address);
		best = bpf_map_lookup_elem(trie, &key->bits);
		if (best && best->prefix + FIXED_BITS + 16 == key->bits)
			return best; /* no prefix is longer, and its key holds the winner */
		sizes ^= PORT_LAST;
	}
	key->bits -= 16; /* the port is in front now */
	for (int turn = 0; turn < SIZES && sizes; turn++) {
		__u64 size = sizes & -sizes; /* the smallest that is left */

		sizes ^= size;
		key->octets[0] = be64(kind | ((port & -size) << 1) + size, address);
		found = bpf_map_lookup_elem(trie, &key->bits);
		if (found && (!best || rank(found) >= rank(best)))
			best = found;
	}
	return best;
}

/* The same flow meets the same socket for as long as the sockets stay the same. */
static __always_inline __u32 flow_hash(const struct bpf_sk_lookup *ctx)
{
	__u32 hash = ctx->remote_port ^ ctx->local_port << 16;

	if (ctx->family == AF_INET) {
		hash = (hash ^ ctx->remote_ip4) * 0x9e3779b1;
		hash = (hash ^ hash >> 15 ^ ctx->local_ip4) * 0x85ebca6b;
	} else {
		hash = (hash ^ ctx->remote_ip6[0] ^ ctx->remote_ip6[1]) * 0x9e3779b1;
		hash = (hash ^ hash >> 15 ^ ctx->remote_ip6[2]) * 0x85ebca6b;
		hash = (hash ^ hash >> 13 ^ ctx->remote_ip6[3]) * 0x9e3779b1;
		hash = (hash ^ hash >> 15 ^ ctx->local_ip6[3]) * 0x85ebca6b;
	}
	return hash ^ hash >> 16;
}

static __always_inline long give(struct bpf_sk_lookup *ctx, __u32 *slot, __u64 *errors)
{
	struct bpf_sock *sock = bpf_map_lookup_elem(&sockets, slot);
	long refused = -1;

	if (sock) {
		/* Not to whom its SO_REUSEPORT group would give it: all that take part have a slot. */
		refused = bpf_sk_assign(ctx, sock, BPF_SK_LOOKUP_F_NO_REUSEPORT);
		bpf_sk_release(sock);
		*errors += !!refused;
	}
	return refused;
}

/* Passes over slots whose socket is gone, or was connected since.  -1: no socket takes it. */
static __always_inline long assign(struct bpf_sk_lookup *ctx, __u32 *slot, __u32 slots, __u64 *errors)
{
	__u64 first = *slot, start = slots > 1 ? (__u64)flow_hash(ctx) * slots >> 32 : 0;

	*slot = first + start;
	if (!give(ctx, slot, errors))
		return 0;
	for (__u64 turn = 1; turn < SLOTS && turn < slots; turn++) {
		*slot = first + (start + turn) % slots;
		if (!give(ctx, slot, errors))
			return 0;
	}
	return -1;
}

static __always_inline int dispatch(struct bpf_sk_lookup *ctx, const _Bool explain)
{
	struct key key;
	struct counters *counts, uncounted = {};
	struct destination *destination;
	struct binding *binding;
	__u16 port = ctx->local_port;
	/* Without CAP_PERFMON no index may lie on the stack where a pointer lay: so, in the key; at
	 * its very begin, or the verifier would take the loop of assign() for endless.
	 */
	__u32 kind, start, *place = &key.index;
	/* Both, lest clang computes an address, which the kernel refuses those without CAP_PERFMON. */
	__u64 sizes, slots, tcp_sizes = settings.tcp_sizes, udp_sizes = settings.udp_sizes;
	void *trie;

	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return SK_PASS;
	if (explain)
		explained.found = 0;
	kind = (ctx->protocol == IPPROTO_UDP) << 1 | (ctx->family == AF_INET6);
	sizes = (kind & 2 ? udp_sizes : tcp_sizes) >> 32 * (kind & 1);
	sizes &= (1 << SIZES) - 1 | PORT_LAST;
	if (!sizes || !(trie = bpf_map_lookup_elem(&bindings, &(__u32){0})))
		return SK_PASS;
	if (!(kind & 1)) {
		key.bits = FIXED_BITS + 32 + 16;
		start = bpf_ntohl(ctx->local_ip4);
		key.octets[1] = be64(port << 16, 0);
		key.octets[2] = 0;
	} else {
		key.bits = FIXED_BITS + 128 + 16;
		start = bpf_ntohl(ctx->local_ip6[0]);
		key.octets[1] = be64(bpf_ntohl(ctx->local_ip6[1]), bpf_ntohl(ctx->local_ip6[2]));
		key.octets[2] = be64(bpf_ntohl(ctx->local_ip6[3]), port << 16);
	}
	if (!(binding = find(trie, &key, kind << 24, start, port, sizes)))
		return SK_PASS;
	if (explain) {
		explained.found = 1;
		explained.binding = *binding;
	}
	if (binding->flags & SPARE_LOCAL && port >= settings.local_low && port <= settings.local_high)
		return SK_PASS;
	*place = binding->destination;
	destination = bpf_map_lookup_elem(&destinations, place);
	*place = *place * KINDS + kind;
	counts = explain ? &uncounted : bpf_map_lookup_elem(&counters, place);
	if (!destination || !counts)
		return SK_DROP;
	*place *= SLOTS;
	counts->lookups++;
	if (!explain)
		__sync_fetch_and_add(&binding->hits, 1);
	slots = destination->slots >> 8 * kind & 0xff;
	if (slots && !assign(ctx, place, slots, &counts->errors))
		return SK_PASS;
	counts->misses++;
	return binding->flags & ON_MISS_PASS ? SK_PASS : SK_DROP;
}

SEC("sk_lookup")
int echo_dispatch(struct bpf_sk_lookup *ctx)
{
	return dispatch(ctx, 0);
}

/* For explain.py, by BPF_PROG_TEST_RUN; never attached.  Counts nothing, tells the winner. */
SEC("sk_lookup")
int echo_explain(struct bpf_sk_lookup *ctx)
{
	return dispatch(ctx, 1);
}
char _license[] SEC("license") = "Dual MIT/GPL";
