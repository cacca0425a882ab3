#include "textflag.h"

// func codeAddr() uintptr
TEXT ·codeAddr(SB), NOSPLIT, $0-8
	LEAQ ·code(SB), AX
	MOVQ AX, ret+0(FP)
	RET

// The leader. It uses no memory but 64 bytes of its stack, and calls nothing,
// so it runs wherever it is put.
//
//	R14  the kernel's argc, argv..., NULL, envp...
//	BX  the program's pid
//	R13 the program's wait status; 126 if it never started
TEXT ·code(SB), NOSPLIT|NOFRAME, $0-0
	MOVQ SP, R14
	SUBQ $64, SP

	// Every signal is blocked: a program that signals its process group or
	// everybody (kill -1) must not end the root of its own tree.
	// rt_sigprocmask(SIG_SETMASK, &all, &old, 8)
	MOVQ $-1, AX
	MOVQ AX, 0(SP)
	MOVL $14, AX
	MOVL $2, DI
	MOVQ SP, SI
	LEAQ 8(SP), DX
	MOVL $8, R10
	SYSCALL

	// prctl(PR_SET_CHILD_SUBREAPER, 1)
	MOVL $157, AX
	MOVL $36, DI
	MOVL $1, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	SYSCALL

	MOVL  $57, AX // fork()
	SYSCALL
	TESTQ AX, AX
	JZ    child
	MOVQ  AX, BX

	// write(3, &pid, 8)
	MOVQ AX, 0(SP)
	MOVL $1, AX
	MOVL $3, DI
	MOVQ SP, SI
	MOVL $8, DX
	SYSCALL

	// Close 3 to 0: who reads the job's output must see its end when the
	// program closes it, not when the leader ends.
	MOVL $3, R12

close:
	MOVL $3, AX
	MOVL R12, DI
	SYSCALL
	DECL R12
	JGE  close

	// chdir("/"): hold no directory of the user's.
	MOVQ $0x2f, AX
	MOVQ AX, 0(SP)
	MOVL $80, AX
	MOVQ SP, DI
	SYSCALL

	MOVL $0x7e00, R13

wait:
	// wait4(-1, &status, 0, NULL)
	MOVL $61, AX
	MOVQ $-1, DI
	MOVQ SP, SI
	XORL DX, DX
	XORL R10, R10
	SYSCALL
	CMPQ AX, $-10 // ECHILD: all are gone
	JEQ  done
	CMPQ AX, BX
	JNE  wait
	MOVL 0(SP), R13
	MOVQ $-2, BX // the pid may come again, in another process
	JMP  wait

done:
	MOVL R13, R12
	ANDL $0x7f, R12
	JNZ  signaled
	SHRL $8, R13
	ANDL $0xff, R13

exit:
	MOVL R13, DI
	MOVL $231, AX // exit_group
	SYSCALL

signaled:
	// The program died by a signal: so do we, but without a second core file.
	// setrlimit(RLIMIT_CORE, {0, 0})
	XORL AX, AX
	MOVQ AX, 0(SP)
	MOVQ AX, 8(SP)
	MOVQ AX, 16(SP)
	MOVQ AX, 24(SP)
	MOVL $160, AX
	MOVL $4, DI
	MOVQ SP, SI
	SYSCALL

	// rt_sigaction(sig, {SIG_DFL}, NULL, 8)
	MOVL $13, AX
	MOVL R12, DI
	MOVQ SP, SI
	XORL DX, DX
	MOVL $8, R10
	SYSCALL

	// kill(getpid(), sig); only this one is let through, since others may be
	// pending.
	MOVL $39, AX
	SYSCALL
	MOVL AX, DI
	MOVL R12, SI
	MOVL $62, AX
	SYSCALL
	MOVL R12, CX
	DECL CX
	MOVQ $1, AX
	SHLQ CX, AX
	NOTQ AX
	MOVQ AX, 0(SP)
	MOVL $14, AX
	MOVL $2, DI
	MOVQ SP, SI
	XORL DX, DX
	MOVL $8, R10
	SYSCALL

	// Not reached, unless the signal does not kill.
	ADDL $128, R12
	MOVL R12, R13
	JMP  exit

child:
	// rt_sigprocmask(SIG_SETMASK, &old, NULL, 8)
	MOVL $14, AX
	MOVL $2, DI
	LEAQ 8(SP), SI
	XORL DX, DX
	MOVL $8, R10
	SYSCALL

	// fcntl(3, F_SETFD, FD_CLOEXEC)
	MOVL $72, AX
	MOVL $3, DI
	MOVL $2, SI
	MOVL $1, DX
	SYSCALL

	// execve(argv[1], &argv[2], envp)
	MOVQ 0(R14), CX
	LEAQ 16(R14)(CX*8), DX
	MOVQ 16(R14), DI
	LEAQ 24(R14), SI
	MOVL $59, AX
	SYSCALL

	// It failed: write(3, &errno, 8); exit 127 for ENOENT, else 126.
	MOVQ AX, R12
	MOVQ AX, 0(SP)
	MOVL $1, AX
	MOVL $3, DI
	MOVQ SP, SI
	MOVL $8, DX
	SYSCALL
	MOVL $127, R13
	CMPQ R12, $-2
	JEQ  exit
	MOVL $126, R13
	JMP  exit

	// marker
	LONG $0x736f6dcc
	LONG $0xcc72646c
