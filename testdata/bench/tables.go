package main

import (
	"compress/gzip"
	"debug/elf"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// writeRuns writes the table of what each program costs to run and to ship.
func writeRuns(w io.Writer, programs []*program, floor, recipe, empty *program) error {
	fmt.Fprintln(w, "| program | wall | CPU | peak memory | wall, CPU ÷ `net/http` | recipe's wall, CPU ÷ its | binary | gzipped | Go packages |")
	fmt.Fprintln(w, "|---|---|---|---|---|---|---|---|---|")
	for _, p := range programs {
		if p.argv == nil {
			fmt.Fprintf(w, "| %s | not installed | | | | | | | |\n", p.name)
			continue
		}
		toFloor, toRecipe := "", ""
		if p != empty {
			toFloor = fmt.Sprintf("%.2f, %.2f", ratio(p.wall(), floor.wall()), ratio(p.cpu(), floor.cpu()))
			if recipe.argv != nil {
				toRecipe = fmt.Sprintf("%.1f, %.1f", ratio(recipe.wall(), p.wall()), ratio(recipe.cpu(), p.cpu()))
			}
		}
		size, zipped, packages := "", "", ""
		if p.binary != "" {
			bytes, compressed, err := sizes(p.binary)
			if err != nil {
				return err
			}
			cmd := exec.Command("go", "list", "-deps", "-tags", "nethttpomithttp2", p.pkg)
			cmd.Dir = p.dir
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			list, err := output(cmd)
			if err != nil {
				return err
			}
			size, zipped, packages = mb(bytes), mb(compressed), fmt.Sprint(strings.Count(list, "\n"))
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s MiB | %s | %s | %s | %s | %s |\n", p.name, ms(p.wall()), ms(p.cpu()), mib(p.peak()),
			toFloor, toRecipe, size, zipped, packages)
	}
	return nil
}

// writeTargets writes what the program is meant to keep, beside what it does.
func writeTargets(w io.Writer, refresher, floor, recipe, empty *program) error {
	bytes, _, err := sizes(refresher.binary)
	if err != nil {
		return err
	}
	row := func(what, target string, got string, kept bool) {
		fmt.Fprintf(w, "| %s | %s | %s | %s |\n", what, target, got, map[bool]string{true: "yes", false: "**no**"}[kept])
	}
	fmt.Fprintln(w, "| meant to keep | target | measured | kept |\n|---|---|---|---|")
	atMost := func(what string, limit, got float64) {
		row(what, fmt.Sprintf("at most %.2f", limit), fmt.Sprintf("%.2f", got), got <= limit)
	}
	atMost("wall time ÷ bare `net/http`", 1.10, ratio(refresher.wall(), floor.wall()))
	atMost("CPU time ÷ bare `net/http`", 1.25, ratio(refresher.cpu(), floor.cpu()))
	if recipe.argv != nil {
		atLeast := func(what string, limit, got float64) {
			row(what, fmt.Sprintf("at least %.0f", limit), fmt.Sprintf("%.1f", got), got >= limit)
		}
		atLeast("recipe's wall time ÷ its own", 20, ratio(recipe.wall(), refresher.wall()))
		atLeast("recipe's CPU time ÷ its own", 40, ratio(recipe.cpu(), refresher.cpu()))
	}
	over := refresher.peak() - empty.peak()
	row("peak memory above an empty Go program", "at most 12 MiB", mib(over)+" MiB", over <= 12<<20)
	row("binary", fmt.Sprintf("at most %s", mb(maxBinary)), mb(bytes), bytes <= maxBinary)
	fmt.Fprintln(w)
	return nil
}

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }

// mb formats decimal megabytes.
func mb(bytes int64) string { return fmt.Sprintf("%.2f MB", float64(bytes)/1e6) }

func sizes(path string) (bytes, gzipped int64, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, err
	}
	var n counter
	z, err := gzip.NewWriterLevel(&n, gzip.BestCompression)
	if err != nil {
		return 0, 0, err
	}
	if _, err := z.Write(b); err != nil {
		return 0, 0, err
	}
	return int64(len(b)), int64(n), z.Close()
}

type counter int64

func (n *counter) Write(b []byte) (int, error) {
	*n += counter(len(b))
	return len(b), nil
}

// reasons says what each direct dependency is for. A dependency without a reason fails the benchmark.
var reasons = map[string]string{
	"github.com/aws/aws-sdk-go-v2":                  "core of the AWS SDK: SigV4, retries, clock-skew correction",
	"github.com/aws/aws-sdk-go-v2/credentials":      "exchange of a web identity, assumed roles, container credentials",
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds": "instance metadata, version 2",
	"github.com/aws/aws-sdk-go-v2/service/ecr":      "GetAuthorizationToken and ECR's endpoints in all partitions",
	"github.com/aws/aws-sdk-go-v2/service/sts":      "AssumeRole, AssumeRoleWithWebIdentity",
	"github.com/aws/smithy-go":                      "transport and errors of the SDK",
	"github.com/evanphx/json-patch/v5":              "RFC 7386 in the tests' API server",
	"github.com/spf13/pflag":                        "GNU-style flags",
	"golang.org/x/crypto/x509roots/fallback":        "public CA roots, so that the image is one file",
}

// dependencyTable tells what each direct dependency adds to the binary. Code and data are counted by the symbols of an
// unstripped build, as go tool nm -size lists them, but those that take no place in the file (.bss). The line tables
// (.gopclntab) have no symbols and are shared out in proportion to the code. Type descriptors and strings, which the
// linker merges, remain as a row of their own, so that the rows add up to the binary.
func dependencyTable(root, dir, stripped string) (string, error) {
	unstripped := filepath.Join(dir, "unstripped")
	if err := build(root, ".", unstripped, nil, "-ldflags="); err != nil {
		return "", err
	}
	f, err := elf.Open(unstripped)
	if err != nil {
		return "", err
	}
	defer f.Close()
	symbols, err := f.Symbols()
	if err != nil {
		return "", err
	}
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	cmd := exec.Command("go", "mod", "edit", "-json")
	cmd.Dir = root
	text, err := output(cmd)
	if err != nil {
		return "", err
	}
	if err := json.Unmarshal([]byte(text), &mod); err != nil {
		return "", err
	}
	var modules, direct []string
	for _, r := range mod.Require {
		modules = append(modules, r.Path)
		if !r.Indirect {
			direct = append(direct, r.Path)
			if reasons[r.Path] == "" {
				return "", fmt.Errorf("testdata/bench/tables.go gives no reason for the dependency %s", r.Path)
			}
		}
	}
	slices.SortFunc(modules, func(a, b string) int { return len(b) - len(a) }) // the most specific first

	const program, goItself, rest = "ecr-refresher itself", "the Go runtime and standard library", "type descriptors, strings, headers"
	code, data := map[string]int64{}, map[string]int64{}
	for _, s := range symbols {
		if int(s.Section) >= len(f.Sections) || f.Sections[s.Section].Type == elf.SHT_NOBITS || elf.ST_TYPE(s.Info) == elf.STT_SECTION {
			continue
		}
		section := f.Sections[s.Section].Name
		if section == ".gopclntab" {
			continue
		}
		owner := goItself
		if strings.HasPrefix(s.Name, "main.") {
			owner = program
		} else if i := slices.IndexFunc(modules, func(m string) bool { return within(s.Name, m) }); i >= 0 {
			owner = modules[i]
		}
		switch section {
		case ".text":
			code[owner] += int64(s.Size)
		default:
			data[owner] += int64(s.Size)
		}
	}
	var allCode int64
	for _, n := range code {
		allCode += n
	}
	lines := f.Section(".gopclntab")
	if lines == nil || allCode == 0 {
		return "", fmt.Errorf("%s has no line table or no symbols", unstripped)
	}
	whole, _, err := sizes(stripped)
	if err != nil {
		return "", err
	}
	left := whole
	cost := map[string]int64{}
	for _, owner := range append(modules, program, goItself) {
		cost[owner] = code[owner] + data[owner] + int64(float64(lines.Size)*float64(code[owner])/float64(allCode))
		left -= cost[owner]
	}
	var b strings.Builder
	fmt.Fprintln(&b, "| dependency | reason | in the binary |\n|---|---|---|")
	row := func(name, reason string, bytes int64) {
		fmt.Fprintf(&b, "| %s | %s | %d kB |\n", name, reason, (bytes+500)/1000)
	}
	slices.SortStableFunc(direct, func(a, b string) int { return int(cost[b] - cost[a]) })
	for _, module := range direct {
		row("`"+module+"`", reasons[module], cost[module])
		delete(cost, module)
	}
	var indirect int64
	for module := range cost {
		if slices.Contains(modules, module) {
			indirect += cost[module]
		}
	}
	row("indirect ones", "parts of the AWS SDK", indirect)
	row(program, "", cost[program])
	row(goItself, "", cost[goItself])
	row(rest, "", left)
	row("**binary**", "", whole)
	return b.String(), nil
}

// within reports whether a symbol belongs to a package of the module: the module's path, then a package's path or a name.
func within(symbol, module string) bool {
	symbol = strings.TrimLeft(symbol, "*")
	for _, prefix := range []string{"go:itab.*", "go:itab.", "type:.eq.", "type:.hash."} {
		symbol = strings.TrimPrefix(symbol, prefix)
	}
	rest, ok := strings.CutPrefix(symbol, module)
	return ok && (strings.HasPrefix(rest, ".") || strings.HasPrefix(rest, "/"))
}
