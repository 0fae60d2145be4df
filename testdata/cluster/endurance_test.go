package cluster

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// installed returns an environment with the chart installed, and the container
// of a CronJob's pod, to be run any number of times. What these tests are about
// is the program: the Helm that installed it is all one.
func installed(t *testing.T) (*environment, container) {
	t.Helper()
	e := newEnvironment(t, "helm4")
	e.install()
	r := e.runNow()
	if r.exit != 0 {
		t.Fatal(r.stderr)
	}
	return e, r.container
}

// runAtOnce runs c n times side by side; all runs have to succeed.
func (e *environment) runAtOnce(c container, n int) {
	e.Helper()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if r := c.run(e.Context()); r.exit != 0 || r.stdout != "" {
				e.Errorf("exit code %d, stdout %q, stderr\n%s", r.exit, r.stdout, r.stderr)
			}
		})
	}
	wg.Wait()
}

// Not parallel, as are all tests that stop a part of the control plane: those
// that are wait until these are done.
func TestRunsOutlastARestartOfTheAPIServer(t *testing.T) {
	e, c := installed(t)
	before := e.secret()
	e.setPassword("second-password")
	e.check(cluster.apiServer.stop())
	restarted := make(chan error)
	go func() {
		time.Sleep(5 * time.Second)
		restarted <- cluster.startAPIServer(e.Context())
	}()
	// Many, since each meets the starting server at another moment.
	e.runAtOnce(c, 40)
	e.check(<-restarted)
	after := e.secret()
	if after.UID != before.UID {
		e.Error("the Secret was replaced")
	}
	e.wantContent(after, "second-password")
}

func TestRunFailsInTimeWhenEtcdIsDown(t *testing.T) {
	e, c := installed(t)
	before := e.secret()
	e.setPassword("second-password")
	e.check(cluster.etcd.stop())
	begin := time.Now()
	c.args = append(c.args, "--timeout=5s")
	r := c.run(e.Context())
	if took := time.Since(begin); r.exit != 1 || took > 6*time.Second {
		e.Errorf("exit code %d after %s", r.exit, took)
	}
	_, line, _ := strings.Cut(r.lastLine(), " ")
	if !strings.HasPrefix(line, "level=ERROR msg=\"patching secret "+e.namespace+"/"+pullSecret+": ") {
		e.Errorf("last line %s", line)
	}
	e.check(cluster.startEtcd())
	// It may have been in the middle of anything.
	e.check(cluster.apiServer.stop())
	e.check(cluster.startAPIServer(e.Context()))
	e.wantSame(before)
	e.runAtOnce(c, 1)
	e.wantContent(e.secret(), "second-password")
}

func TestFiftyRunsAtOnceAllSucceed(t *testing.T) {
	e, c := installed(t)
	before := e.secret()
	e.setPassword("second-password")
	e.runAtOnce(c, 50)
	after := e.secret()
	if after.UID != before.UID {
		e.Error("the Secret was replaced")
	}
	e.wantContent(after, "second-password")

	e.deleteSecret()
	e.runAtOnce(c, 50)
	e.wantContent(e.secret(), "second-password")
}

func TestKilledRunLeavesTheOldOrTheNewSecret(t *testing.T) {
	t.Parallel()
	e, c := installed(t)
	e.runAtOnce(c, 1)
	// The moments lie between a run's start and limit, which follows how long a run takes while other tests work.
	limit := 20 * time.Millisecond

	current := "first-password" // what the Secret holds; empty: it does not exist
	var kept, changed, created int
	for i := range 200 {
		next := fmt.Sprintf("password-%d", i)
		e.setPassword(next)
		if i%4 == 0 && current != "" {
			e.deleteSecret()
			current = ""
		}
		cmd := c.command(e.Context())
		e.check(cmd.Start())
		time.Sleep(rand.N(limit))
		cmd.Process.Kill()
		cmd.Wait()
		time.Sleep(20 * time.Millisecond) // the server may be at work on a request that is there already

		s, err := cluster.client.CoreV1().Secrets(e.namespace).Get(e.Context(), pullSecret, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err) && current == "":
			kept++
			limit += limit / 10
			continue
		case err != nil:
			e.Fatal(err)
		case sameConfig(s, next):
			e.wantContent(s, next) // all of it
			changed++
			if current == "" {
				created++
			}
			current = next
			limit -= limit / 5
		case sameConfig(s, current):
			kept++
			limit += limit / 10
		default:
			e.Fatalf("round %d: the Secret holds %q", i, s.Data)
		}
	}
	if kept < 20 || changed < 20 || created < 2 {
		e.Errorf("%d kept, %d changed, %d of them created: the moments were not spread over a run, at last within %s", kept, changed, created, limit)
	}
}

// sameConfig tells whether s holds what a run with password writes, byte by byte.
func sameConfig(s *corev1.Secret, password string) bool {
	return len(s.Data) == 1 && string(s.Data[corev1.DockerConfigJsonKey]) == dockerConfig(password)
}

func TestThousandRunsDoNotGrowTheSecret(t *testing.T) {
	t.Parallel()
	e, c := installed(t)
	size := func() int {
		b, err := json.Marshal(e.secret())
		e.check(err)
		return len(b)
	}
	const early, runs = 100, 1000 // the first runs take over the fields that the creating one owned
	var before int
	for i := range runs {
		e.setPassword(fmt.Sprintf("password-%04d", i))
		e.runAtOnce(c, 1)
		if i == early {
			before = size()
		}
		if e.Failed() {
			return
		}
	}
	s := e.secret()
	e.wantContent(s, fmt.Sprintf("password-%04d", runs-1))
	if after := size(); after > before+3 { // the resourceVersion may have more digits
		e.Errorf("%d bytes after %d runs, %d after %d", before, early, after, runs)
	}
	if len(s.Annotations) != 2 || len(s.Labels) != 1 || len(s.ManagedFields) > 2 {
		e.Errorf("annotations %v, labels %v, managed by %v", s.Annotations, s.Labels, s.ManagedFields)
	}
}
