// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Steers connections and datagrams for whole prefixes and port ranges to registered sockets.
 * Runs (as BPF_PROG_TYPE_SK_LOOKUP, Linux 5.9) when a packet finds no established TCP
 * connection and no connected UDP socket.  Never allocates, never looks at payload.
 *
 * Which binding wins, rank() says, and model.py in Python; tests compare the two.
 *
 * How the cost stays independent of the number of bindings: a range of ports is cut into
 * aligned blocks of 2^n ports.  A packet's port lies in one block of each of the 17 sizes, so
 * one LPM lookup per size that is in use finds, for that size, the longest prefix.  Two
 * bindings that share a block (same prefix) are settled when they are written: the block's
 * key holds the winner.  The layout of the maps is layout.py's, too, and numbered there.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum { AF_INET = 2, AF_INET6 = 10, IPPROTO_TCP = 6, IPPROTO_UDP = 17 };

#define SIZES 17 /* blocks of 2^0 to 2^16 ports */
#define KINDS 4 /* (TCP, UDP) x (IPv4, IPv6) */
#define DESTINATIONS 1024 /* labels */
#define SLOTS 32 /* sockets of one label and kind */
#define FIXED_BITS 32 /* of a key, before its address: always compared whole */

enum flags {
	ON_MISS_PASS = 1, /* without a live socket: normal lookup instead of a drop */
	SPARE_LOCAL = 2, /* leave their ports to local clients */
};

/* All of an IPv4 key is in the first 64 bits, which the trie compares at once. */
struct key {
	__u32 bits; /* of what follows, for the LPM trie */
	__be32 block; /* kind << 24, and 2 * its first port + the number of its ports */
	__be32 address[4];
	__u32 zero;
};

struct binding {
	__u64 hits;
	__u32 destination;
	__u16 low, high; /* of the range, which may have more blocks */
	__u8 prefix;
	__u8 flags;
	__u8 zero[6];
};

struct destination {
	char label[64];
	__u32 slots[KINDS]; /* how many are looked at; a slot may be empty */
};

struct counters { __u64 lookups, misses, errors; };

struct settings {
	__u32 layout;
	__u32 sizes[KINDS]; /* bit n: blocks of 2^n ports are in use (or were, a moment ago) */
	__u16 local_low, local_high; /* ip_local_port_range: where local clients get their ports */
	__u8 source[32]; /* digest of the file in force, for load-bindings */
	__u32 capacity; /* of each trie */
};

struct explained { struct binding binding; __u32 found, zero; };

struct trie {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(key_size, sizeof(struct key)); /* clang leaves the type of an inner map's key out */
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

MAP(settings, ARRAY, 1, struct settings);
MAP(destinations, ARRAY, DESTINATIONS, struct destination);
MAP(sockets, SOCKMAP, DESTINATIONS * KINDS * SLOTS, __u64); /* a closed socket leaves by itself */
MAP(counters, PERCPU_ARRAY, DESTINATIONS * KINDS, struct counters);
MAP(explained, ARRAY, 1, struct explained);

static const __u32 zero;

/* What makes a binding win: its prefix, then how narrow it is, then how high. */
static __always_inline __u64 rank(const struct binding *one)
{
	__u16 narrowness = ~(one->high - one->low);

	return (__u64)one->prefix << 32 | (__u64)narrowness << 16 | one->low;
}

static __always_inline struct binding *find(void *trie, struct key *key, __u32 kind, __u64 port,
					    __u64 sizes)
{
	struct binding *best = NULL, *found;
	__u64 size = sizes & -sizes; /* the smallest that is left */

	for (int turn = 0; turn < SIZES && sizes; turn++) {
		key->block = bpf_htonl(kind << 24 | ((port & -size) << 1) + size);
		found = bpf_map_lookup_elem(trie, key);
		sizes ^= size;
		size = sizes & -sizes;
		if (!found || (best && rank(found) < rank(best)))
			continue;
		best = found;
		/* Bindings in wider blocks are wider, so none wins over one of this very address. */
		if (FIXED_BITS + best->prefix == key->bits && best->high - best->low + 1 < size)
			break;
	}
	return best;
}

/* array[kind], with no index that the kernel cannot foresee (without CAP_PERFMON). */
static __always_inline __u32 of_kind(const volatile __u32 *array, __u32 kind)
{
	__u32 all[KINDS] = {array[0], array[1], array[2], array[3]};

	return kind & 2 ? (kind & 1 ? all[3] : all[2]) : (kind & 1 ? all[1] : all[0]);
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
	struct key key __attribute__((aligned(8))) = {};
	struct counters *counts, uncounted = {};
	struct destination *destination;
	struct explained *report = NULL;
	struct settings *now = bpf_map_lookup_elem(&settings, &zero);
	struct binding *binding;
	__u16 port = ctx->local_port;
	/* Without CAP_PERFMON no index may lie on the stack where a pointer lay: so, in the key. */
	__u32 kind, *place = &key.bits;
	__u64 sizes, slots;
	void *trie;

	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return SK_PASS;
	kind = (ctx->protocol == IPPROTO_UDP) << 1 | (ctx->family == AF_INET6);
	if (explain) {
		if (!(report = bpf_map_lookup_elem(&explained, &zero)))
			return SK_PASS;
		report->found = 0;
	}
	sizes = now ? of_kind(now->sizes, kind) & ((1 << SIZES) - 1) : 0;
	if (!sizes || !(trie = bpf_map_lookup_elem(&bindings, &zero)))
		return SK_PASS;
	key.bits = FIXED_BITS + (ctx->family == AF_INET6 ? 128 : 32);
	if (ctx->family == AF_INET)
		key.address[0] = ctx->local_ip4;
	else
		for (int word = 0; word < 4; word++)
			key.address[word] = ctx->local_ip6[word];
	binding = find(trie, &key, kind, port, sizes);
	if (!binding)
		return SK_PASS;
	if (explain) {
		report->found = 1;
		report->binding = *binding;
	}
	if (binding->flags & SPARE_LOCAL && port >= now->local_low && port <= now->local_high)
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
	slots = of_kind(destination->slots, kind);
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
