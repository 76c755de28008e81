// Makes a processor with AVX-512 look like one with AVX2, to every library of a process: a library to preload.
//
//     cc -O2 -shared -fPIC -o without_avx512.so without_avx512.c -ldl
//     LD_PRELOAD=./without_avx512.so python -m pytest
//
// Libraries learn what a processor has by the instruction CPUID. Linux can make it fault on processors that support this
// (the flag cpuid_fault in /proc/cpuinfo; arch_prctl(2), ARCH_SET_CPUID); the handler answers in its place, with the
// bits of AVX-512, AVX-VNNI and AMX cleared. So PyTorch, oneDNN, MKL, ONNX Runtime and OpenVINO all take their paths for
// AVX2, at the speed of the processor. Only what was decided before (by the dynamic loader) uses more.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(number) (1u << (number))

// What the process itself wants to happen at a segmentation fault.
static struct sigaction of_process;

static long let_cpuid_run(long runs) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, runs); }

static void clear_bits(unsigned leaf, unsigned subleaf, unsigned *ebx, unsigned *ecx, unsigned *edx, unsigned *eax) {
  if (leaf != 7) return;
  if (subleaf == 0) {
    *ebx &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(28) | BIT(30) | BIT(31));            // AVX-512 F, DQ, IFMA, CD, BW, VL
    *ecx &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));                        // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    *edx &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));     // 4VNNIW, 4FMAPS, VP2INTERSECT, FP16, AMX
  } else if (subleaf == 1) {
    *eax &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));               // AVX-VNNI, AVX-512 BF16, AMX-FP16, AVX-IFMA
    *edx &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19));      // AVX-VNNI-INT8, NE-CONVERT, AMX-COMPLEX, VNNI-INT16, AVX10
  }
}

static void at_fault(int signal_number, siginfo_t *information, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
  if (information->si_code == SI_KERNEL && instruction[0] == 0x0f && instruction[1] == 0xa2) {
    const unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX];
    unsigned eax, ebx, ecx, edx;
    let_cpuid_run(1);
    __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx);
    let_cpuid_run(0);
    clear_bits(leaf, subleaf, &ebx, &ecx, &edx, &eax);
    registers[REG_RAX] = eax;
    registers[REG_RBX] = ebx;
    registers[REG_RCX] = ecx;
    registers[REG_RDX] = edx;
    registers[REG_RIP] += 2;
    return;
  }
  if (of_process.sa_flags & SA_SIGINFO) {
    of_process.sa_sigaction(signal_number, information, context);
  } else if (of_process.sa_handler != SIG_DFL && of_process.sa_handler != SIG_IGN) {
    of_process.sa_handler(signal_number);
  } else {  // the fault happens again, and ends the process
    struct sigaction standard = {.sa_handler = SIG_DFL};
    syscall(SYS_rt_sigaction, SIGSEGV, &standard, NULL, 8);
  }
}

// The handler above stays in place, whatever handler the process asks for, and no thread blocks the signal.

int sigaction(int signal_number, const struct sigaction *action, struct sigaction *before) {
  static int (*next)(int, const struct sigaction *, struct sigaction *);
  if (!next) next = dlsym(RTLD_NEXT, "sigaction");
  if (signal_number != SIGSEGV) return next(signal_number, action, before);
  if (before) *before = of_process;
  if (action) of_process = *action;
  return 0;
}

sighandler_t signal(int signal_number, sighandler_t handler) {
  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, before;
  return sigaction(signal_number, &action, &before) ? SIG_ERR : before.sa_handler;
}

static const sigset_t *without_fault(const sigset_t *set, sigset_t *copy) {
  if (!set) return NULL;
  *copy = *set;
  sigdelset(copy, SIGSEGV);
  return copy;
}

int pthread_sigmask(int how, const sigset_t *set, sigset_t *before) {
  static int (*next)(int, const sigset_t *, sigset_t *);
  if (!next) next = dlsym(RTLD_NEXT, "pthread_sigmask");
  sigset_t copy;
  return next(how, how == SIG_UNBLOCK ? set : without_fault(set, &copy), before);
}

int sigprocmask(int how, const sigset_t *set, sigset_t *before) {
  static int (*next)(int, const sigset_t *, sigset_t *);
  if (!next) next = dlsym(RTLD_NEXT, "sigprocmask");
  sigset_t copy;
  return next(how, how == SIG_UNBLOCK ? set : without_fault(set, &copy), before);
}

__attribute__((constructor)) static void start(void) {
  // On the thread's own stack: an alternate one, as faulthandler sets up, is too small for the registers of AMX.
  struct sigaction action = {.sa_sigaction = at_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
  int (*next)(int, const struct sigaction *, struct sigaction *) = dlsym(RTLD_NEXT, "sigaction");
  if (next(SIGSEGV, &action, NULL) || let_cpuid_run(0)) {
    perror("without_avx512: this processor, or this Linux, cannot make CPUID fault");
    exit(EXIT_FAILURE);
  }
}
