// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Steers connections and datagrams for whole prefixes and port ranges to registered sockets.
 * Runs (as BPF_PROG_TYPE_SK_LOOKUP, Linux 5.9) when a packet finds no established TCP
 * connection and no connected UDP socket.  Never allocates, never looks at payload.
 *
 * Which binding wins: the longest prefix; then the narrowest range of ports; then, of two
 * equally wide ones, the higher.  model.py says the same in Python, and tests compare the two.
 *
 * How the cost stays independent of the number of bindings: a range of ports is cut into
 * aligned blocks of 2^n ports.  A packet's port lies in one block of each of the 17 sizes, so
 * one LPM lookup per size that is in use finds, for that size, the longest prefix.  Two
 * bindings that share a block (same prefix) are settled when they are written: the block's
 * key holds the winner.
 *
 * The layout of the maps is layout.py's, too, and numbered there.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum { AF_INET = 2, AF_INET6 = 10, IPPROTO_TCP = 6, IPPROTO_UDP = 17 };

#define SIZES 17 /* blocks of 2^0 to 2^16 ports */
#define KINDS 4 /* (TCP, UDP) x (IPv4, IPv6) */
#define DESTINATIONS 1024
#define SLOTS 32 /* sockets of one label and kind */
#define LABEL 64
#define FIXED_BITS 48 /* of a key, kind to high: always compared whole */

enum flags {
	ON_MISS_PASS = 1, /* without a live socket: normal lookup instead of a drop */
	SPARE_LOCAL = 2, /* leave the ports of local clients to them (UDP replies come there) */
};

struct key {
	__u32 bits; /* of what follows, for the LPM trie */
	__u8 kind;
	__u8 zero;
	__be16 low, high; /* of the block */
	__be32 address[4];
} __attribute__((packed, aligned(2)));

struct binding {
	__u64 hits;
	__u32 destination;
	__u16 low, high; /* of the range, which may have more blocks */
	__u8 prefix;
	__u8 flags;
	__u8 zero[6];
};

struct destination {
	char label[LABEL];
	__u32 slots[KINDS]; /* how many are looked at; a slot may be empty */
};

struct counters {
	__u64 lookups, misses, errors;
};

struct settings {
	__u32 layout;
	__u32 sizes[KINDS]; /* bit n: blocks of 2^n ports are in use (or were, a moment ago) */
	__u16 local_low, local_high; /* ip_local_port_range: where local clients get their ports */
	__u8 source[32]; /* digest of the file in force, for load-bindings */
	__u32 capacity; /* of each trie */
};

struct explained {
	struct binding binding;
	__u32 found;
	__u32 zero;
};

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
		__uint(type, BPF_MAP_TYPE_##kind); \
		__uint(max_entries, entries); \
		__type(key, __u32); \
		__type(value, element); \
	} name SEC(".maps")

MAP(settings, ARRAY, 1, struct settings);
MAP(destinations, ARRAY, DESTINATIONS, struct destination);
MAP(sockets, SOCKMAP, DESTINATIONS * KINDS * SLOTS, __u64); /* a closed socket leaves by itself */
MAP(counters, PERCPU_ARRAY, DESTINATIONS * KINDS, struct counters);
MAP(explained, ARRAY, 1, struct explained);

static const __u32 zero;

static __always_inline _Bool wins(const struct binding *one, const struct binding *other)
{
	__u32 width = one->high - one->low, other_width = other->high - other->low;

	if (one->prefix != other->prefix)
		return one->prefix > other->prefix;
	return width != other_width ? width < other_width : one->low > other->low;
}

static __always_inline struct binding *find(void *trie, struct key *key, __u16 port, __u32 sizes)
{
	struct binding *best = NULL, *found;

#pragma unroll
	for (__u32 size = 0; size < SIZES; size++) {
		__u16 mask = (1u << size) - 1;

		if (!(sizes >> size & 1))
			continue;
		key->low = bpf_htons(port & ~mask);
		key->high = bpf_htons(port | mask);
		found = bpf_map_lookup_elem(trie, key);
		if (found && (!best || wins(found, best)))
			best = found;
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

/* Passes over slots whose socket is gone, or was connected since.  -1: no socket takes it. */
static __always_inline int assign(struct bpf_sk_lookup *ctx, __u32 *slot, __u32 slots,
				  __u64 *errors)
{
	struct bpf_sock *sock;
	__u64 start, first = *slot;

	start = slots ? flow_hash(ctx) % slots : 0;
	for (__u64 turn = 0; turn < SLOTS && turn < slots; turn++) {
		*slot = first + (start + turn) % slots;
		sock = bpf_map_lookup_elem(&sockets, slot);
		if (!sock)
			continue;
		long refused = bpf_sk_assign(ctx, sock, 0);
		bpf_sk_release(sock);
		if (!refused)
			return 0;
		++*errors;
	}
	return -1;
}

static __always_inline int dispatch(struct bpf_sk_lookup *ctx, const _Bool explain)
{
	struct key key __attribute__((aligned(8))) = {};
	struct counters *counts, uncounted = {};
	struct destination *destination;
	struct explained *report = bpf_map_lookup_elem(&explained, &zero);
	struct settings *now = bpf_map_lookup_elem(&settings, &zero);
	struct binding *binding;
	__u16 port = ctx->local_port;
	/* Without CAP_PERFMON no index may lie on the stack where a pointer lay: so, in the key. */
	__u32 kind, *place = &key.bits;
	void *trie;

	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return SK_PASS;
	kind = (ctx->protocol == IPPROTO_UDP) << 1 | (ctx->family == AF_INET6);
	key.kind = kind;
	key.bits = FIXED_BITS + (ctx->family == AF_INET6 ? 128 : 32);
	if (ctx->family == AF_INET)
		key.address[0] = ctx->local_ip4;
	else
		for (int word = 0; word < 4; word++)
			key.address[word] = ctx->local_ip6[word];
	trie = bpf_map_lookup_elem(&bindings, &zero);
	if (!now || !trie)
		return SK_PASS;
	binding = find(trie, &key, port, of_kind(now->sizes, kind));
	if (explain && report) {
		report->found = !!binding;
		if (binding)
			report->binding = *binding;
	}
	if (!binding)
		return SK_PASS;
	if (!explain)
		__sync_fetch_and_add(&binding->hits, 1);
	if (binding->flags & SPARE_LOCAL && port >= now->local_low && port <= now->local_high)
		return SK_PASS;

	*place = binding->destination;
	destination = bpf_map_lookup_elem(&destinations, place);
	*place = *place * KINDS + kind;
	counts = explain ? &uncounted : bpf_map_lookup_elem(&counters, place);
	if (!destination || !counts)
		return SK_DROP;
	counts->lookups++;
	*place *= SLOTS;
	if (!assign(ctx, place, of_kind(destination->slots, kind), &counts->errors))
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
