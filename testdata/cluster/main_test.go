// Package cluster proves the program and its chart on a real control plane: etcd and kube-apiserver on loopback, Helm 3
// and Helm 4, and a node that runs the pods' processes.
//
//	go test -C testdata/cluster ./...
//
// What it needs it builds from Go modules, once: give the first run -timeout 40m. Programs that are there already are
// taken from the folder that KUBEBUILDER_ASSETS names (etcd, kube-apiserver, kubectl).
package cluster

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// What every test uses; set by TestMain and not changed after.
var (
	cluster *controlPlane
	worker  *node
	program string // path of the compiled ecr-refresher
)

func TestMain(m *testing.M) {
	if os.Getenv(supervised) != "" {
		os.Exit(supervise(os.Args[1:]))
	}
	flag.Parse()
	os.Exit(runTests(m))
}

func runTests(m *testing.M) (code int) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		return 1
	}
	paths, err := buildTools(ctx)
	if err != nil {
		return fail(err)
	}
	dir, err := os.MkdirTemp("", "cluster")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "ecr-refresher")
	// As the image has it.
	if err := goBuild(ctx, filepath.Join("..", ".."), program, "-trimpath", "-tags", "nethttpomithttp2", "-ldflags", "-s -w", "."); err != nil {
		return fail(err)
	}
	begin := time.Now()
	cluster, err = startControlPlane(ctx, dir, paths)
	if err != nil {
		return fail(fmt.Errorf("%w\n%s", err, (&controlPlane{dir: dir}).logTails()))
	}
	defer func() {
		if code != 0 {
			fmt.Fprintln(os.Stderr, cluster.logTails())
		}
		if err := cluster.stop(); err != nil {
			code = fail(err)
		}
	}()
	fmt.Fprintf(os.Stderr, "control plane ready in %s\n", time.Since(begin).Round(100*time.Millisecond))
	worker = newNode(cluster, filepath.Join(dir, "node"))
	go worker.run(ctx)
	return m.Run()
}
