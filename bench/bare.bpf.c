// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* What running any sk_lookup program costs here: to be set beside dispatch's figures. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("sk_lookup")
int bare(struct bpf_sk_lookup *ctx __attribute__((unused)))
{
	return SK_PASS;
}
char _license[] SEC("license") = "Dual MIT/GPL";
