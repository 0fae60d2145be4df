// Chartdoc writes the table of values in chart/README.md from the comments in
// chart/values.yaml. Run it in the top folder of the repository:
//
//	go run ./testdata/chartdoc         # writes the table
//	go run ./testdata/chartdoc -check  # exits 1 when the table is stale
//
// It reads the small part of YAML that values.yaml is written in, line by line:
// two spaces a level, one key a line, lists and short maps in flow style. A
// comment that starts with "# --" and stands above a key describes that key and
// all that lies below it; a key without one may only be a section of keys that
// have their own.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
)

const (
	valuesFile  = "chart/values.yaml"
	readmeFile  = "chart/README.md"
	beginMarker = "<!-- begin of the table from values.yaml -->\n"
	endMarker   = "<!-- end of the table from values.yaml -->\n"
)

func main() {
	check := flag.Bool("check", false, "write nothing, exit 1 when the table is stale")
	flag.Parse()
	if err := run(*check); err != nil {
		fmt.Fprintln(os.Stderr, "chartdoc:", err)
		os.Exit(1)
	}
}

func run(check bool) error {
	values, err := os.ReadFile(valuesFile)
	if err != nil {
		return err
	}
	readme, err := os.ReadFile(readmeFile)
	if err != nil {
		return err
	}
	table, err := valuesTable(string(values))
	if err != nil {
		return fmt.Errorf("%s: %w", valuesFile, err)
	}
	head, rest, foundBegin := strings.Cut(string(readme), beginMarker)
	_, tail, foundEnd := strings.Cut(rest, endMarker)
	if !foundBegin || !foundEnd {
		return fmt.Errorf("%s: the two markers of the table are missing", readmeFile)
	}
	fresh := []byte(head + beginMarker + table + endMarker + tail)
	if bytes.Equal(fresh, readme) {
		return nil
	}
	if check {
		return errors.New(readmeFile + " is stale: go run ./testdata/chartdoc")
	}
	return os.WriteFile(readmeFile, fresh, 0o644)
}

var keyLine = regexp.MustCompile(`^( *)([A-Za-z0-9]+):(?: +(.+))?$`)

// valuesTable returns the Markdown table of a values file, in the file's order.
func valuesTable(values string) (string, error) {
	table := "| value | default | meaning |\n|---|---|---|\n"
	var path []string  // keys from the top down to the last one read
	var comment string // the "# --" comment read so far, "" outside of one
	section := -1      // level of the last key when it has no default of its own, else -1
	lines := strings.Split(strings.TrimRight(values, "\n"), "\n")
	for i := 0; i < len(lines); i++ {
		text := strings.TrimSpace(lines[i])
		if text == "" {
			comment = ""
			continue
		}
		if after, ok := strings.CutPrefix(text, "# -- "); ok {
			comment = after
			continue
		}
		if after, ok := strings.CutPrefix(text, "#"); ok {
			if comment != "" {
				comment += " " + strings.TrimSpace(after)
			}
			continue
		}
		m := keyLine.FindStringSubmatch(lines[i])
		if m == nil || len(m[1])%2 != 0 || len(m[1])/2 > len(path) {
			return "", fmt.Errorf("line %d: not one key, two spaces a level", i+1)
		}
		level, key, value := len(m[1])/2, m[2], m[3]
		if section >= level {
			return "", fmt.Errorf("line %d: the section above has no keys", i+1)
		}
		section = -1
		path = append(path[:level], key)
		switch {
		case comment == "" && value != "":
			return "", fmt.Errorf("line %d: %s has no \"# --\" comment", i+1, strings.Join(path, "."))
		case comment == "":
			section = level
			continue
		case value == "":
			var below []string
			for i+1 < len(lines) && strings.HasPrefix(lines[i+1], m[1]+"  ") {
				i++
				below = append(below, lines[i])
			}
			var err error
			if value, err = flowMap(below); err != nil {
				return "", fmt.Errorf("%s: %w", strings.Join(path, "."), err)
			}
		}
		table += fmt.Sprintf("| `%s` | `%s` | %s |\n", strings.Join(path, "."), value, strings.ReplaceAll(comment, "|", `\|`))
		comment = ""
	}
	if section >= 0 {
		return "", fmt.Errorf("line %d: the section has no keys", len(lines))
	}
	return table, nil
}

// flowMap writes a block of "key: value" lines, all of one level, as a flow map.
func flowMap(lines []string) (string, error) {
	var pairs []string
	for _, line := range lines {
		m := keyLine.FindStringSubmatch(line)
		if m == nil || m[3] == "" {
			return "", fmt.Errorf("%q is not a key with its value on the same line", line)
		}
		pairs = append(pairs, m[2]+": "+m[3])
	}
	if len(pairs) == 0 {
		return "", errors.New("no value")
	}
	return "{" + strings.Join(pairs, ", ") + "}", nil
}
