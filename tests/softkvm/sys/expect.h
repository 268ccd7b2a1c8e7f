/* What each scene reports, as the manuals have it (handlers.h explains the letters). */
#ifndef TESTS_SOFTKVM_SYS_EXPECT_H
#define TESTS_SOFTKVM_SYS_EXPECT_H

#define EXPECT_FAULTS64 \
	"\n" \
	"v6 r0 c18 f10000 s10 k7\n" \
	"v0 r0 c18 f10000 s10 k7\n" \
	"v3 r1 c18 f0 s10 k7\n" \
	"v30 r2 c18 f0 s10 k7\n" \
	"vd e1234 r0 c18 f10000 s10 k7\n" \
	"vd e18 r0 c18 f10000 s10 k7\n" \
	"vb e50 r0 c18 f10000 s10 k7\n" \
	"vc e50 r0 c18 f10000 s10 k7\n" \
	"ve e0 r0 c18 f10000 a40000123 s10 k7\n" \
	"ve e2 r0 c18 f10000 a40000123 s10 k7\n" \
	"vd e0 r0 c18 f10000 s10 k7\n" \
	"vc e0 r0 c18 f10000 s10 k7\n" \
	"vd e0 r0 c18 f10000 s10 k7\n" \
	"vd e0 r0 c18 f10000 s10 k7\n" \
	"vd e0 r0 c18 f10000 s10 k7\n" \
	"vd e482 r0 c18 f10000 s10 k7\n" \
	"vd e28 r8 c18 f10000 s10 k7 [f4=41]\n" \
	"exit 2\n"
#define KVM_FAULTS64 NULL

#define EXPECT_USER64 \
	"\n" \
	"vd e0 r0 c23 f10200 s0 k6\n" \
	"vd e0 r0 c23 f10200 s0 k6\n" \
	"vd e0 r0 c23 f10200 s0 k6\n" \
	"vd e182 r0 c23 f10200 s0 k6\n" \
	"v31 r2 c23 f200 s0 k6\n" \
	"vd e0 r0 c23 f10200 s0 k6 [61=6]\n" \
	"vd e0 r0 c23 f10200 s0 k6\n" \
	"vd e10 re c23 f10200 s0 k6\n" \
	"vd e4 r0 c23 f10200 s0 k6 [61=23] [61=43] [61=0]\n" \
	"v31 r0 c43 f200 s0 k6\n" \
	"v6 r0 c23 f10200 s0 k6 [f4=41]\n" \
	"exit 2\n"
#define KVM_USER64 "it runs ring 3 on the host itself: the host's selectors show and INT is #UD"

#define EXPECT_SYSCALL64 \
	" [61=2b] [61=23] [62=3202] [63=0] [64=3202] [61=18] [61=20] [62=3046] [65=5678] [61=2b]\n" \
	"vd e0 r0 c2b f13200 s0 k6 [f4=41]\n" \
	"exit 2\n"
#define KVM_SYSCALL64 "it runs ring 3 on the host itself: the host's selectors and flags show"

#define EXPECT_IST64 \
	"\n" \
	"v6 r0 c18 f10000 s10 k9\n" \
	"vc e0 r0 c18 f10000 s10 ka\n" \
	"vc e0 r0 c18 f10000 s10 ka\n" \
	"v8 e0 r0 c18 f10000 s10 kc\n" \
	"exit 8\n"
#define KVM_IST64 NULL

#define EXPECT_DEBUG64 \
	"\n" \
	"v1 r0 c18 f100 dffff4ff0 s10 k7\n" \
	"v1 rb c18 f0 dffff0ff1 s10 k7\n" \
	"v1 r7 c18 f0 dffff0ff1 s10 k7\n" \
	"v1 r0 c18 f0 dffff0ff2 s10 k7\n" \
	"v1 r0 c18 f0 dffff2ff0 s10 k7 [62=400]\n" \
	"v1 r1 c18 f0 dffff0ff0 s10 k7\n" \
	"v1 r0 c18 f100 dffff4ff0 s10 k7\n" \
	"v1 r0 c18 f10100 dffff4ff0 s10 k7\n" \
	"v1 r2 c18 f100 dffff4ff0 s10 k7 [62=9003] [f4=41]\n" \
	"exit 2\n"
#define KVM_DEBUG64 "it has no data breakpoints"

#define EXPECT_FAULTS32 \
	"\n" \
	"v6 r0 c8 f10000 s10 k7\n" \
	"v4 r8 c8 f0 s10 k7\n" \
	"v31 r2 c8 f0 s10 k7\n" \
	"vd e1234 r0 c8 f10000 s10 k7\n" \
	"vb e50 r0 c8 f10000 s10 k7\n" \
	"vc e50 r0 c8 f10000 s10 k7\n" \
	"vd e0 r6 c8 f10000 s10 k7\n" \
	"vd e0 r0 c8 f10000 s10 k7\n" \
	"vd e0 r6 c8 f10000 s10 k7\n" \
	"vd e0 r0 c8 f10000 s10 k7\n" \
	"vd e0 r0 c8 f10000 s10 k7\n" \
	"vd e70 r0 c8 f10000 s10 k7\n" \
	"vd e10 r0 c8 f10000 s10 k7\n" \
	"vd e0 r0 c8 f10000 s10 k7 [62=cf9300] [62=fff] [63=0] [63=1] [62=1233] [f4=41]\n" \
	"exit 2\n"
#define KVM_FAULTS32 NULL

#define EXPECT_GATES32 \
	" [61=8] [62=2222] [62=1111] [61=10] [62=8ff8] [61=43] [61=0]\n" \
	"v31 r2 c43 f0 s10 k6\n" \
	"vd e58 r0 c43 f10000 s10 k6\n" \
	"vd e8 r0 c43 f10000 s10 k6\n" \
	"vd e0 r0 c43 f10000 s10 k6 [f4=41]\n" \
	"exit 2\n"
#define KVM_GATES32 NULL

#define EXPECT_TASK32 \
	" [62=77] [61=50] [63=4002] [61=30] [64=8b] [64=8b] [62=99] [63=2] [62=39] [61=30] [62=78] [61=50] [63=4006] [61=30] [64=8b] [64=8b] [62=99]\n" \
	"va e1230 rad c8 f10000 s10 k10 [61=50] [f4=41]\n" \
	"exit 2\n"
#define KVM_TASK32 NULL

#define EXPECT_VM86 \
	" [61=1000] [61=1234]\n" \
	"vd e0 r0 c1000 f33000 s10 k6 [61=3002]\n" \
	"v31 r2 c1000 f23000 s10 k6\n" \
	"vd e192 r0 c1000 f33000 s10 k6\n" \
	"vd e0 r0 c1000 f33200 s10 k6\n" \
	"v6 r0 c1000 f33200 s10 k6 [f4=41]\n" \
	"exit 2\n"
#define KVM_VM86 NULL

#define EXPECT_VM86_IOPL0 \
	"\n" \
	"vd e0 r0 c1000 f30000 s10 k6\n" \
	"vd e0 r0 c1000 f30000 s10 k6\n" \
	"vd e0 r0 c1000 f30000 s10 k6\n" \
	"v3 r1 c1000 f20000 s10 k6\n" \
	"vd e0 r0 c1000 f30000 s10 k6 [f4=41]\n" \
	"exit 2\n"
#define KVM_VM86_IOPL0 NULL

#define EXPECT_REAL16 \
	" [63=0] [63=1000] [63=200] [63=0] [61=246] [63=fffe] [63=1000] [63=200] [63=0] [63=fffe] [63=1000] [63=200] [63=0] [63=0] [63=1000] [63=200] [63=0] [61=1000] [61=8000] [61=1010] [62=12345678] [f4=41]\n" \
	"exit 2\n"
#define KVM_REAL16 NULL

#define EXPECT_MODES16 \
	" [64=5a] [62=500] [62=12345678] [61=18] [62=100] [61=8] [f4=41]\n" \
	"exit 2\n"
#define KVM_MODES16 NULL

#endif
