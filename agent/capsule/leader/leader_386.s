#include "textflag.h"

// func codeAddr() uintptr
TEXT ·codeAddr(SB), NOSPLIT, $0-4
	LEAL ·code(SB), AX
	MOVL AX, ret+0(FP)
	RET

// The leader; leader_amd64.s has the comments.
//
//	BP     the kernel's argc, argv..., NULL, envp...
//	32(SP) the program's pid
//	36(SP) the program's wait status; 126 if it never started
//	40(SP) the signal to die by
TEXT ·code(SB), NOSPLIT|NOFRAME, $0-0
	MOVL SP, BP
	SUBL $64, SP

	// rt_sigprocmask(SIG_SETMASK, &all, &old, 8)
	MOVL $-1, 0(SP)
	MOVL $-1, 4(SP)
	MOVL $175, AX
	MOVL $2, BX
	MOVL SP, CX
	LEAL 8(SP), DX
	MOVL $8, SI
	INT  $0x80

	// prctl(PR_SET_CHILD_SUBREAPER, 1)
	MOVL $172, AX
	MOVL $36, BX
	MOVL $1, CX
	XORL DX, DX
	XORL SI, SI
	XORL DI, DI
	INT  $0x80

	MOVL  $2, AX // fork()
	INT   $0x80
	TESTL AX, AX
	JZ    child
	MOVL  AX, 32(SP)

	// write(3, &pid, 4)
	MOVL $4, AX
	MOVL $3, BX
	LEAL 32(SP), CX
	MOVL $4, DX
	INT  $0x80

	// close 3 to 0
	MOVL $3, BX

close:
	MOVL $6, AX
	INT  $0x80
	DECL BX
	JGE  close

	// chdir("/")
	MOVL $0x2f, 0(SP)
	MOVL $12, AX
	MOVL SP, BX
	INT  $0x80

	MOVL $0x7e00, 36(SP)

wait:
	// wait4(-1, &status, 0, NULL)
	MOVL $114, AX
	MOVL $-1, BX
	MOVL SP, CX
	XORL DX, DX
	XORL SI, SI
	INT  $0x80
	CMPL AX, $-10 // ECHILD
	JEQ  done
	CMPL AX, 32(SP)
	JNE  wait
	MOVL 0(SP), AX
	MOVL AX, 36(SP)
	MOVL $-2, 32(SP)
	JMP  wait

done:
	MOVL 36(SP), BX
	MOVL BX, CX
	ANDL $0x7f, CX
	JNZ  signaled
	SHRL $8, BX
	ANDL $0xff, BX

exit:
	MOVL $252, AX // exit_group
	INT  $0x80

signaled:
	MOVL CX, 40(SP)

	// setrlimit(RLIMIT_CORE, {0, 0})
	XORL AX, AX
	MOVL AX, 0(SP)
	MOVL AX, 4(SP)
	MOVL AX, 8(SP)
	MOVL AX, 12(SP)
	MOVL AX, 16(SP)
	MOVL $75, AX
	MOVL $4, BX
	MOVL SP, CX
	INT  $0x80

	// rt_sigaction(sig, {SIG_DFL}, NULL, 8)
	MOVL $174, AX
	MOVL 40(SP), BX
	MOVL SP, CX
	XORL DX, DX
	MOVL $8, SI
	INT  $0x80

	// kill(getpid(), sig)
	MOVL $20, AX
	INT  $0x80
	MOVL AX, BX
	MOVL 40(SP), CX
	MOVL $37, AX
	INT  $0x80

	// rt_sigprocmask(SIG_SETMASK, all but sig, NULL, 8)
	MOVL $-1, 0(SP)
	MOVL $-1, 4(SP)
	MOVL 40(SP), CX
	DECL CX
	MOVL CX, DX
	SHRL $5, DX
	MOVL $1, AX
	ANDL $31, CX
	SHLL CX, AX
	NOTL AX
	MOVL AX, 0(SP)(DX*4)
	MOVL $175, AX
	MOVL $2, BX
	MOVL SP, CX
	XORL DX, DX
	MOVL $8, SI
	INT  $0x80
	MOVL 40(SP), BX
	ADDL $128, BX
	JMP  exit

child:
	// rt_sigprocmask(SIG_SETMASK, &old, NULL, 8)
	MOVL $175, AX
	MOVL $2, BX
	LEAL 8(SP), CX
	XORL DX, DX
	MOVL $8, SI
	INT  $0x80

	// fcntl(3, F_SETFD, FD_CLOEXEC)
	MOVL $55, AX
	MOVL $3, BX
	MOVL $2, CX
	MOVL $1, DX
	INT  $0x80

	// execve(argv[1], &argv[2], envp)
	MOVL 0(BP), AX
	LEAL 8(BP)(AX*4), DX
	MOVL 8(BP), BX
	LEAL 12(BP), CX
	MOVL $11, AX
	INT  $0x80

	// It failed: write(3, &errno, 4)
	MOVL AX, 0(SP)
	MOVL $4, AX
	MOVL $3, BX
	MOVL SP, CX
	MOVL $4, DX
	INT  $0x80
	MOVL $127, BX
	CMPL 0(SP), $-2 // ENOENT
	JEQ  exit
	MOVL $126, BX
	JMP  exit

	// marker
	LONG $0x736f6dcc
	LONG $0xcc72646c
