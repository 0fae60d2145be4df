// Command bench measures ecr-refresher on this machine: whole runs against stand-ins on loopback, over TLS, beside the least
// that any Go program would need (floor), the usual shell recipe, and the same job with heavier libraries (variants).
//
//	go run ./testdata/bench [-rounds N] [-write]   measure; -write puts the tables into README.md
//	go run ./testdata/bench -check                 fail when the binary is larger than it may be
//	go run ./testdata/bench -reproducible          fail when two builds in two folders differ
//
// It needs Linux and, for the recipe's row, aws, curl and base64 in /usr/local/bin, /usr/bin or /bin.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"ecr-refresher/testdata/standin"
)

const (
	maxBinary  = 8_800_000 // bytes of the linux/amd64 program
	memoryCage = 16 << 20  // bytes, a limit that the program must run in
	cageRounds = 20

	namespace = "shop"
	secret    = "ecr-credentials"
	region    = "eu-central-1"
	account   = "123456789012"
	registry  = account + ".dkr.ecr." + region + ".amazonaws.com"
	podToken  = "service-account-token"
)

func main() {
	rounds := flag.Int("rounds", 40, "rounds, each with one run of every program")
	write := flag.Bool("write", false, "put the tables into README.md")
	check := flag.Bool("check", false, "only build the program for linux/amd64 and check its size")
	reproducible := flag.Bool("reproducible", false, "only check that two builds in two folders give the same bytes")
	flag.Parse()
	var err error
	switch {
	case flag.NArg() > 0 || *rounds < 1:
		flag.Usage()
		os.Exit(2)
	case *check:
		err = inTempDir(checkSize)
	case *reproducible:
		err = inTempDir(checkReproducible)
	default:
		err = inTempDir(func(root, dir string) error { return bench(root, dir, *rounds, *write) })
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// inTempDir calls f with the main module's folder and with a folder for the time of the call.
func inTempDir(f func(root, dir string) error) error {
	gomod, err := output(exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "ecr-refresher"))
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "ecr-refresher-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	return f(strings.TrimSpace(gomod), dir)
}

// build builds pkg of the module in dir as the Dockerfile builds the program. The Dockerfile has no .git at hand, so
// -buildvcs=false. Further arguments come last and win.
func build(dir, pkg, out string, env []string, args ...string) error {
	cmd := exec.Command("go", slices.Concat([]string{"build", "-buildvcs=false", "-trimpath", "-tags", "nethttpomithttp2",
		"-ldflags", "-s -w", "-o", out}, args, []string{pkg})...)
	cmd.Dir = dir
	cmd.Env = slices.Concat(os.Environ(), []string{"CGO_ENABLED=0"}, env)
	_, err := output(cmd)
	return err
}

// output runs cmd and returns its standard output; its error holds the standard error.
func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

func checkSize(root, dir string) error {
	program := filepath.Join(dir, "ecr-refresher")
	if err := build(root, ".", program, []string{"GOOS=linux", "GOARCH=amd64"}); err != nil {
		return err
	}
	info, err := os.Stat(program)
	if err != nil {
		return err
	}
	fmt.Printf("linux/amd64 binary: %d bytes, at most %d\n", info.Size(), maxBinary)
	if info.Size() > maxBinary {
		return fmt.Errorf("the binary is %d bytes too large", info.Size()-maxBinary)
	}
	return nil
}

// checkReproducible builds copies of the program's sources in two folders of different depth. The second build has a build
// cache of its own, so that it compiles all packages again instead of reading the first one's.
func checkReproducible(root, dir string) error {
	var sums [2][sha256.Size]byte
	for i, folder := range []string{"a", "b/deeper"} {
		copied := filepath.Join(dir, folder)
		if err := os.MkdirAll(copied, 0o755); err != nil {
			return err
		}
		sources, err := filepath.Glob(filepath.Join(root, "*.go"))
		if err != nil {
			return err
		}
		for _, source := range append(sources, filepath.Join(root, "go.mod"), filepath.Join(root, "go.sum")) {
			b, err := os.ReadFile(source)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(copied, filepath.Base(source)), b, 0o644); err != nil {
				return err
			}
		}
		var env []string
		if i == 1 {
			env = []string{"GOCACHE=" + filepath.Join(dir, "cache")}
		}
		program := filepath.Join(copied, "ecr-refresher")
		if err := build(copied, ".", program, env); err != nil {
			return err
		}
		b, err := os.ReadFile(program)
		if err != nil {
			return err
		}
		sums[i] = sha256.Sum256(b)
		fmt.Printf("%x  %s/ecr-refresher\n", sums[i], folder)
	}
	if sums[0] != sums[1] {
		return errors.New("two builds of the same sources differ")
	}
	return nil
}

// program is a row of the table.
type program struct {
	name   string
	binary string   // path; empty for the recipe
	pkg    string   // Go package, of the module in dir
	dir    string   //
	argv   []string // nil: not installed
	idle   bool     // it leaves the Secret alone
	runs   []usage
}

// usage is what one run cost.
type usage struct {
	wall, cpu time.Duration
	peak      int64 // bytes of resident memory
}

func (p *program) wall() time.Duration {
	return median(p.runs, func(u usage) time.Duration { return u.wall })
}
func (p *program) cpu() time.Duration {
	return median(p.runs, func(u usage) time.Duration { return u.cpu })
}
func (p *program) peak() int64 { return median(p.runs, func(u usage) int64 { return u.peak }) }

func median[T time.Duration | int64](runs []usage, of func(usage) T) T {
	var values []T
	for _, run := range runs {
		values = append(values, of(run))
	}
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

func bench(root, dir string, rounds int, write bool) error {
	if runtime.GOOS != "linux" {
		return errors.New("peak memory is measured as Linux counts it: run it on Linux")
	}
	mount := filepath.Join(dir, "serviceaccount")
	flags := []string{"--secret", secret, "--service-account-dir", mount}
	variants := filepath.Join(root, "testdata", "bench", "variants")
	refresher := &program{name: "ecr-refresher", pkg: ".", dir: root, argv: flags}
	floor := &program{name: "bare `net/http`, the same two exchanges", pkg: "./testdata/bench/floor", dir: root, argv: []string{secret, mount}}
	recipe := &program{name: "`aws` and `curl` in a shell"}
	empty := &program{name: "an empty Go program", pkg: "./testdata/bench/empty", dir: root, argv: []string{}, idle: true}
	programs := []*program{refresher, floor,
		{name: "with the SDK's `config` module", pkg: "./config", dir: variants, argv: flags},
		{name: "with `config` and client-go", pkg: "./clientgo", dir: variants, argv: flags},
		recipe, empty}
	launch := filepath.Join(dir, "launch")
	if err := build(root, "./testdata/bench/launch", launch, nil); err != nil {
		return err
	}
	for _, p := range programs {
		if p.pkg == "" {
			continue
		}
		fmt.Fprintln(os.Stderr, "building", p.name)
		p.binary = filepath.Join(dir, filepath.Base(p.pkg)+".bin")
		if err := build(p.dir, p.pkg, p.binary, nil); err != nil {
			return err
		}
		p.argv = append([]string{p.binary}, p.argv...)
	}
	awsVersion := "aws is not installed"
	if haveAll("aws", "curl", "base64") {
		recipe.argv = []string{"/bin/sh", filepath.Join(root, "testdata", "bench", "recipe.sh"), secret, mount}
		cmd := exec.Command("aws", "--version")
		cmd.Path, _ = find("aws")
		cmd.Env = []string{"PATH=" + searchPath, "HOME=" + dir}
		out, err := cmd.CombinedOutput() // version 1 prints it on stderr
		if err != nil {
			return fmt.Errorf("aws --version: %w\n%s", err, out)
		}
		awsVersion, _, _ = strings.Cut(string(out), " ")
	}

	w, err := newWorld(dir, mount)
	if err != nil {
		return err
	}
	defer w.close()
	for round := range rounds + 1 { // the first one warms up and is not counted
		fmt.Fprintf(os.Stderr, "\rround %d of %d", round, rounds)
		for _, i := range rand.Perm(len(programs)) {
			p := programs[i]
			if p.argv == nil {
				continue
			}
			u, err := w.run(p, append([]string{launch}, p.argv...))
			if err != nil {
				return err
			}
			if round > 0 {
				p.runs = append(p.runs, u)
			}
		}
	}
	fmt.Fprintln(os.Stderr)

	var table strings.Builder
	fmt.Fprintf(&table, "Medians of %d interleaved rounds of whole processes against stand-ins on loopback; %s, %s, %s.\n\n",
		rounds, machine(), strings.TrimPrefix(runtime.Version(), "go version "), awsVersion)
	if err := writeRuns(&table, programs, floor, recipe, empty); err != nil {
		return err
	}
	fmt.Fprintln(&table)
	if err := writeTargets(&table, refresher, floor, recipe, empty); err != nil {
		return err
	}
	inCage, err := w.cage(refresher)
	if err != nil {
		return err
	}
	fmt.Fprintln(&table, inCage)
	deps, err := dependencyTable(root, dir, refresher.binary)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n%s", table.String(), deps)
	if !write {
		return nil
	}
	return writeReadme(filepath.Join(root, "README.md"), map[string]string{"bench": table.String(), "deps": deps})
}

// searchPath is where the recipe's programs are looked for. The environment's own PATH may lead to wrappers that cost more
// than the programs.
const searchPath = "/usr/local/bin:/usr/bin:/bin"

func find(name string) (string, bool) {
	for _, dir := range filepath.SplitList(searchPath) {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, true
		}
	}
	return "", false
}

func haveAll(names ...string) bool {
	return !slices.ContainsFunc(names, func(name string) bool { _, ok := find(name); return !ok })
}

// world is an AWS account and a cluster on loopback, and the environment of a pod in it.
type world struct {
	kubernetes *standin.Kubernetes
	want       string // .dockerconfigjson after a run
	env        []string
	close      func()
}

func newWorld(dir, mount string) (*world, error) {
	ca, err := standin.NewCA()
	if err != nil {
		return nil, err
	}
	cert, err := ca.Certificate(standin.CertOptions{Hosts: []string{"127.0.0.1"}})
	if err != nil {
		return nil, err
	}
	bundle := filepath.Join(dir, "aws-ca.pem")
	if err := errors.Join(standin.WriteServiceAccount(mount, podToken, namespace, ca.PEM()), os.WriteFile(bundle, ca.PEM(), 0o600)); err != nil {
		return nil, err
	}
	kubernetes := standin.NewKubernetes(namespace)
	kubernetes.SetTokens(podToken)
	kubernetes.SetRules(standin.Rule{Namespace: namespace, Verbs: []string{"patch"}, ResourceNames: []string{secret}})
	// As long as a real one: about 2,500 bytes.
	ecr := &standin.ECR{Region: region, Account: account, Password: strings.Repeat("eyJwYXlsb2FkIjoi", 156)}
	key := standin.Key{ID: "AKIAEXAMPLE", Secret: "long-lived-secret"}
	ecr.Allow(key)
	api, aws := standin.Start(kubernetes, cert), standin.Start(ecr, cert)
	apiURL, err := url.Parse(api.URL)
	if err != nil {
		return nil, err
	}
	want, err := json.Marshal(map[string]any{"auths": map[string]any{
		registry: map[string]string{"username": "AWS", "password": ecr.Password, "auth": ecr.Token()},
	}})
	return &world{
		kubernetes: kubernetes,
		want:       string(want),
		env: []string{
			"PATH=" + searchPath,
			"HOME=" + dir,
			"KUBERNETES_SERVICE_HOST=" + apiURL.Hostname(),
			"KUBERNETES_SERVICE_PORT=" + apiURL.Port(),
			"AWS_REGION=" + region,
			"AWS_ENDPOINT_URL_ECR=" + aws.URL,
			"AWS_CA_BUNDLE=" + bundle,
			"AWS_ACCESS_KEY_ID=" + key.ID,
			"AWS_SECRET_ACCESS_KEY=" + key.Secret,
			"REGISTRY=" + registry, // for the recipe
		},
		close: func() { api.Close(); aws.Close() },
	}, err
}

// run runs p by argv, which starts the launcher, and checks that the run did p's job.
func (w *world) run(p *program, argv []string) (usage, error) {
	w.kubernetes.Put(namespace, secret, map[string]any{
		"type": "kubernetes.io/dockerconfigjson",
		"data": map[string]any{".dockerconfigjson": "e30="},
	})
	report, child, err := os.Pipe()
	if err != nil {
		return usage{}, err
	}
	defer report.Close()
	var stderr bytes.Buffer
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = w.env
	cmd.Stderr = &stderr
	cmd.ExtraFiles = []*os.File{child}
	err = cmd.Run()
	child.Close()
	if err != nil {
		return usage{}, fmt.Errorf("%s: %w\n%s", p.name, err, stderr.String())
	}
	var code int
	var wall, user, system, peak int64
	if _, err := fmt.Fscan(report, &code, &wall, &user, &system, &peak); err != nil {
		return usage{}, fmt.Errorf("%s: reading the launcher's report: %w", p.name, err)
	}
	if code != 0 {
		return usage{}, fmt.Errorf("%s: exit code %d\n%s", p.name, code, stderr.String())
	}
	if !p.idle && !w.refreshed() {
		return usage{}, fmt.Errorf("%s: the Secret does not hold ECR's token\n%s", p.name, stderr.String())
	}
	return usage{time.Duration(wall), time.Duration(user + system), peak}, nil
}

// refreshed reports whether the Secret holds the docker config that every program is to write.
func (w *world) refreshed() bool {
	var object struct{ Data map[string][]byte }
	b, err := json.Marshal(w.kubernetes.Secret(namespace, secret))
	if err != nil || json.Unmarshal(b, &object) != nil {
		return false
	}
	var got, want any
	return json.Unmarshal(object.Data[".dockerconfigjson"], &got) == nil && json.Unmarshal([]byte(w.want), &want) == nil &&
		fmt.Sprint(got) == fmt.Sprint(want)
}

// cage runs p in a control group with a memory limit of memoryCage, and says how that went. Where this user may not make
// one, it says what wait4 saw.
func (w *world) cage(p *program) (string, error) {
	for _, kind := range []struct{ dir, limit, swap string }{
		{"/sys/fs/cgroup", "memory.max", "memory.swap.max"},                     // version 2
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.swappiness"}, // version 1
	} {
		group, err := os.MkdirTemp(kind.dir, "ecr-refresher-bench-")
		if err != nil {
			continue
		}
		defer os.Remove(group)
		set := func(file string, value int) error { // only a file that is there: the folder may be no control group's
			f, err := os.OpenFile(filepath.Join(group, file), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(f, value)
			return errors.Join(err, f.Close())
		}
		if set(kind.limit, memoryCage) != nil || set(kind.swap, 0) != nil {
			continue
		}
		// The shell joins the group, and copies the program there, so that the program's pages in the page cache count as well.
		const inGroup = `echo $$ >"$0/cgroup.procs" && cp "$2" "$3" && launch=$1 && shift 2 && exec "$launch" "$@"`
		argv := slices.Concat([]string{"/bin/sh", "-c", inGroup, group, filepath.Join(filepath.Dir(p.binary), "launch"), p.binary, p.binary + ".caged"}, p.argv[1:])
		for range cageRounds {
			os.Remove(p.binary + ".caged")
			if _, err := w.run(p, argv); err != nil {
				return "", fmt.Errorf("in a memory limit of %d bytes: %w", memoryCage, err)
			}
		}
		return fmt.Sprintf("In a control group with a memory limit of %s MiB and no swap, the binary's pages counted, %d of %d runs succeed.",
			mib(memoryCage), cageRounds, cageRounds), nil
	}
	most := slices.MaxFunc(p.runs, func(a, b usage) int { return int(a.peak - b.peak) }).peak
	if most > memoryCage {
		return "", fmt.Errorf("a run had %d bytes of resident memory, more than the %d that it must run in", most, memoryCage)
	}
	return fmt.Sprintf("No control group could be made here; the largest resident memory of its %d runs was %s MiB, below %s MiB.",
		len(p.runs), mib(most), mib(memoryCage)), nil
}

// machine names what the numbers were taken on.
func machine() string {
	model := "unknown processor"
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if name, ok := strings.CutPrefix(line, "model name"); ok {
			model = strings.Trim(name, "\t: \n")
			break
		}
	}
	return fmt.Sprintf("%s/%s, %d cores of %s", runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), model)
}

// writeReadme puts each text between the markers <!-- NAME:begin --> and <!-- NAME:end -->.
func writeReadme(path string, texts map[string]string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	readme := string(b)
	for name, text := range texts {
		before, rest, begun := strings.Cut(readme, "<!-- "+name+":begin -->\n")
		_, after, ended := strings.Cut(rest, "<!-- "+name+":end -->")
		if !begun || !ended {
			return fmt.Errorf("%s has no lines <!-- %s:begin --> and <!-- %s:end -->", path, name, name)
		}
		readme = before + "<!-- " + name + ":begin -->\n" + text + "<!-- " + name + ":end -->" + after
	}
	return os.WriteFile(path, []byte(readme), 0o644)
}

func mib(bytes int64) string { return fmt.Sprintf("%.1f", float64(bytes)/(1<<20)) }

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }
