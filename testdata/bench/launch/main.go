// Command launch runs a program and reports what it cost.
//
//	launch PROGRAM [ARG...]
//
// It writes one line to file descriptor 3: exit code, wall time, user and system CPU time in nanoseconds, and peak resident
// memory in bytes, as wait4 counts them: the program and the children that it waited for.
//
// It is a program of its own because of the peak: Linux hands a process the peak of the address space that it was started
// from, so a start from the benchmark itself would measure the benchmark. For the same reason it uses nothing but syscall.
package main

import (
	"os"
	"strconv"
	"syscall"
	"time"
)

func main() {
	start := time.Now()
	pid, err := syscall.ForkExec(os.Args[1], os.Args[1:], &syscall.ProcAttr{Env: syscall.Environ(), Files: []uintptr{0, 1, 2}})
	var status syscall.WaitStatus
	var usage syscall.Rusage
	for err == nil {
		if _, err = syscall.Wait4(pid, &status, 0, &usage); err != syscall.EINTR {
			break
		}
		err = nil
	}
	wall := time.Since(start)
	if err != nil {
		syscall.Write(2, []byte("launch: "+os.Args[1]+": "+err.Error()+"\n"))
		os.Exit(1)
	}
	line := strconv.Itoa(status.ExitStatus()) // -1 when a signal ended it
	for _, n := range []int64{wall.Nanoseconds(), usage.Utime.Nano(), usage.Stime.Nano(), usage.Maxrss << 10} {
		line += " " + strconv.FormatInt(n, 10)
	}
	syscall.Write(3, []byte(line+"\n"))
}
