package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// tool is a program that the tests run beside the refresher. The tools have
// modules of their own below tools/, because Helm and Kubernetes do not agree
// on the version of what they share. Helm 3 and Helm 4 do, which halves their
// build.
type tool struct {
	name   string // file name in the cache
	module string // folder below tools/
	pkg    string
}

var tools = []tool{
	{"kube-apiserver", "kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver"},
	{"kubectl", "kubernetes", "k8s.io/kubernetes/cmd/kubectl"},
	{"etcd", "kubernetes", "go.etcd.io/etcd/server/v3"},
	{"helm3", "helm", "helm.sh/helm/v3/cmd/helm"},
	{"helm4", "helm", "helm.sh/helm/v4/cmd/helm"},
}

// buildTools returns the path of each tool by its name. What KUBEBUILDER_ASSETS
// (envtest's variable: a folder with etcd, kube-apiserver and kubectl) holds is
// taken from there; the rest is built once per set of versions into the user's
// cache folder.
func buildTools(ctx context.Context) (map[string]string, error) {
	// go test ends a test binary one minute after -timeout and says nothing of
	// the cause. A cold build is the one thing here that can take that long.
	if d := flag.Lookup("test.timeout").Value.(flag.Getter).Get().(time.Duration); d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	paths := make(map[string]string)
	for _, t := range tools {
		if assets := os.Getenv("KUBEBUILDER_ASSETS"); assets != "" {
			path := filepath.Join(assets, t.name)
			if _, err := os.Stat(path); err == nil {
				paths[t.name] = path
				continue
			}
		}
		path, err := buildTool(ctx, t, filepath.Join(cache, "ecr-refresher", "cluster"))
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, fmt.Errorf("building %s did not end within go test's -timeout: "+
				"give a cold build more, as in -timeout 40m, or run again (what was compiled is kept)", t.name)
		}
		if err != nil {
			return nil, fmt.Errorf("building %s: %w", t.name, err)
		}
		paths[t.name] = path
	}
	return paths, nil
}

// buildTool builds t unless cache holds it already, under a key of everything
// that decides on the program's content.
func buildTool(ctx context.Context, t tool, cache string) (string, error) {
	dir := filepath.Join("tools", t.module)
	mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil {
		return "", err
	}
	sum, err := os.ReadFile(filepath.Join(dir, "go.sum"))
	if err != nil {
		return "", err
	}
	// Helm 3 and Kubernetes learn from the linker alone which version of
	// Kubernetes they are, as their release scripts do it; without it no
	// chart's kubeVersion admits them.
	flags := "-s -w"
	switch t.module {
	case "kubernetes":
		const pkg = " -X k8s.io/component-base/version.git"
		v, major, minor := required(string(mod), "k8s.io/kubernetes")
		flags += pkg + "Version=" + v + pkg + "Major=" + major + pkg + "Minor=" + minor
	case "helm":
		const pkg = " -X helm.sh/helm/v3/pkg/chartutil.k8sVersion"
		_, _, minor := required(string(mod), "k8s.io/client-go")
		flags += pkg + "Major=1" + pkg + "Minor=" + minor
	}
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), runtime.GOOS, runtime.GOARCH, flags)
	h.Write(mod)
	h.Write(sum)
	out := filepath.Join(cache, t.module+"-"+hex.EncodeToString(h.Sum(nil))[:12], t.name)
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return "", err
	}
	fmt.Fprintf(os.Stderr, "building %s (once)\n", t.name)
	begin := time.Now()
	tmp := fmt.Sprintf("%s.%d", out, os.Getpid())
	defer os.Remove(tmp)
	if err := goBuild(ctx, dir, tmp, "-ldflags", flags, t.pkg); err != nil {
		return "", err
	}
	fmt.Fprintf(os.Stderr, "built %s in %s\n", t.name, time.Since(begin).Round(time.Second))
	return out, os.Rename(tmp, out)
}

// required returns the version of a module that mod, a go.mod, requires.
func required(mod, module string) (version, major, minor string) {
	for line := range strings.Lines(mod) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == module {
			major, rest, _ := strings.Cut(strings.TrimPrefix(f[1], "v"), ".")
			minor, _, _ := strings.Cut(rest, ".")
			return f[1], major, minor
		}
	}
	return "", "", ""
}

// goBuild runs go build in dir. CGO is off: the programs are static, and no C
// compiler is needed.
func goBuild(ctx context.Context, dir, out string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-o", out}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	// The go command ends its compilers when it is interrupted, and would
	// leave them behind when it is killed.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, tail(string(msg), 20))
	}
	return nil
}
