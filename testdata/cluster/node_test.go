package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// serviceAccountDir is where a pod finds its service-account mount.
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// result is what one run of the program left behind.
type result struct {
	exit           int
	stdout, stderr string
	container      container // what was run
}

// lastLine returns the last line on stderr, which is what a pod's status shows.
func (r result) lastLine() string { return tail(r.stderr, 1) }

// node plays the parts of a cluster that turn a Job into a process: the Job
// controller (one try a Job, no back-off), the scheduler and the kubelet. Pods
// are real objects of the API server, so admission judges them, and tokens,
// Secrets and ConfigMaps come from it; the process is the compiled program with
// the pod's args and env. Only the file system is not the pod's: a path below
// a volume's mount path is replaced by the path of the folder that holds it.
type node struct {
	cp  *controlPlane
	dir string // the pods' volumes

	mu      sync.Mutex
	seen    map[types.UID]bool // Jobs and Pods taken
	results map[string]result  // of a Job's or a bare Pod's end, by namespace/name
	ended   chan struct{}      // closed and replaced at each new result
	tokens  map[string]string  // by namespace: what stands in for the default mount's token
}

func newNode(cp *controlPlane, dir string) *node {
	return &node{
		cp: cp, dir: dir,
		seen: make(map[types.UID]bool), results: make(map[string]result),
		ended: make(chan struct{}), tokens: make(map[string]string),
	}
}

// run takes up every Job and every bare Pod of the cluster until ctx ends.
func (n *node) run(ctx context.Context) {
	jobs := func(o metav1.ListOptions) (runtime.Object, watch.Interface, error) {
		list, err := n.cp.client.BatchV1().Jobs("").List(ctx, o)
		if err != nil {
			return nil, nil, err
		}
		o.ResourceVersion = list.ResourceVersion
		w, err := n.cp.client.BatchV1().Jobs("").Watch(ctx, o)
		return list, w, err
	}
	pods := func(o metav1.ListOptions) (runtime.Object, watch.Interface, error) {
		list, err := n.cp.client.CoreV1().Pods("").List(ctx, o)
		if err != nil {
			return nil, nil, err
		}
		o.ResourceVersion = list.ResourceVersion
		w, err := n.cp.client.CoreV1().Pods("").Watch(ctx, o)
		return list, w, err
	}
	var wg sync.WaitGroup
	for _, listAndWatch := range []func(metav1.ListOptions) (runtime.Object, watch.Interface, error){jobs, pods} {
		wg.Go(func() {
			for ctx.Err() == nil {
				list, w, err := listAndWatch(metav1.ListOptions{})
				if err != nil {
					time.Sleep(100 * time.Millisecond)
					continue
				}
				switch list := list.(type) {
				case *batchv1.JobList:
					for _, job := range list.Items {
						n.take(ctx, &job)
					}
				case *corev1.PodList:
					for _, pod := range list.Items {
						n.take(ctx, &pod)
					}
				}
				for event := range w.ResultChan() {
					if event.Type == watch.Added {
						n.take(ctx, event.Object)
					}
				}
			}
		})
	}
	wg.Wait()
}

// take starts the work that a new object asks for, once.
func (n *node) take(ctx context.Context, object runtime.Object) {
	var work func() result
	var meta metav1.ObjectMeta
	switch o := object.(type) {
	case *batchv1.Job:
		meta, work = o.ObjectMeta, func() result { return n.runJob(ctx, o) }
	case *corev1.Pod:
		if metav1.GetControllerOf(o) != nil {
			return // runJob's
		}
		meta, work = o.ObjectMeta, func() result { return n.runPod(ctx, o) }
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.seen[meta.UID] {
		return
	}
	n.seen[meta.UID] = true
	go func() {
		r := work()
		n.mu.Lock()
		defer n.mu.Unlock()
		n.results[meta.Namespace+"/"+meta.Name] = r
		close(n.ended)
		n.ended = make(chan struct{})
	}()
}

// wait returns how the Job or bare Pod of that name ended, and forgets it, so
// that the name can be used again.
func (n *node) wait(ctx context.Context, namespace, name string) (result, error) {
	for {
		n.mu.Lock()
		r, ok := n.results[namespace+"/"+name]
		delete(n.results, namespace+"/"+name)
		ended := n.ended
		n.mu.Unlock()
		if ok {
			return r, nil
		}
		select {
		case <-ended:
		case <-ctx.Done():
			return result{}, fmt.Errorf("waiting for the end of %s/%s: %w", namespace, name, ctx.Err())
		}
	}
}

// useToken makes the default mount of every later pod of the namespace hold
// token; an empty one undoes it.
func (n *node) useToken(namespace, token string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.tokens[namespace] = token
}

// runJob does the Job controller's part: one pod, and the Job's end.
func (n *node) runJob(ctx context.Context, job *batchv1.Job) result {
	begin := metav1.Now()
	template := job.Spec.Template
	labels := maps.Clone(template.Labels)
	if labels == nil {
		labels = make(map[string]string)
	}
	labels[batchv1.JobNameLabel] = job.Name
	labels[batchv1.ControllerUidLabel] = string(job.UID)
	pod, err := n.cp.client.CoreV1().Pods(job.Namespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			GenerateName:    job.Name + "-",
			Labels:          labels,
			Annotations:     template.Annotations,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(job, batchv1.SchemeGroupVersion.WithKind("Job"))},
		},
		Spec: template.Spec,
	}, metav1.CreateOptions{})
	r := result{exit: -1}
	if err != nil {
		r.stderr = err.Error()
	} else {
		r = n.runPod(ctx, pod)
	}
	end := metav1.Now()
	condition := func(t batchv1.JobConditionType) batchv1.JobCondition {
		return batchv1.JobCondition{Type: t, Status: corev1.ConditionTrue, LastTransitionTime: end, LastProbeTime: end}
	}
	job = job.DeepCopy()
	job.Status = batchv1.JobStatus{StartTime: &begin, UncountedTerminatedPods: &batchv1.UncountedTerminatedPods{}}
	if r.exit == 0 {
		job.Status.Succeeded = 1
		job.Status.CompletionTime = &end
		job.Status.Conditions = []batchv1.JobCondition{condition(batchv1.JobSuccessCriteriaMet), condition(batchv1.JobComplete)}
	} else {
		job.Status.Failed = 1
		job.Status.Conditions = []batchv1.JobCondition{condition(batchv1.JobFailureTarget), condition(batchv1.JobFailed)}
	}
	if _, err := n.cp.client.BatchV1().Jobs(job.Namespace).UpdateStatus(ctx, job, metav1.UpdateOptions{}); err != nil {
		r.stderr += "\nnode: " + err.Error()
	}
	return r
}

// runPod does the kubelet's part: the process, and the pod's end.
func (n *node) runPod(ctx context.Context, pod *corev1.Pod) result {
	r := result{exit: -1}
	c, err := n.container(ctx, pod)
	if err != nil {
		r.stderr = err.Error() // what a kubelet calls CreateContainerConfigError
	} else {
		r = c.run(ctx)
	}
	pod = pod.DeepCopy()
	pod.Status.Phase = corev1.PodSucceeded
	if r.exit != 0 {
		pod.Status.Phase = corev1.PodFailed
	}
	terminated := &corev1.ContainerStateTerminated{ExitCode: int32(r.exit), FinishedAt: metav1.Now()}
	spec := pod.Spec.Containers[0]
	if r.exit != 0 && spec.TerminationMessagePolicy == corev1.TerminationMessageFallbackToLogsOnError {
		// The kubelet's bounds: 80 lines and 2048 bytes.
		terminated.Message = tail(r.stderr, 80)
		terminated.Message = terminated.Message[max(0, len(terminated.Message)-2048):]
	}
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{
		Name: spec.Name, Image: spec.Image, State: corev1.ContainerState{Terminated: terminated},
	}}
	if _, err := n.cp.client.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
		r.stderr += "\nnode: " + err.Error()
	}
	return r
}

// container is a pod's container, ready to be run any number of times.
type container struct {
	args, env []string
	mount     string // the folder that is the service-account mount
}

// command returns the program, not yet started.
func (c container) command(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, c.args...)
	cmd.Env = c.env
	return cmd
}

// run runs the program to its end.
func (c container) run(ctx context.Context) result {
	cmd := c.command(ctx)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r := result{exit: cmd.ProcessState.ExitCode(), stdout: stdout.String(), stderr: stderr.String(), container: c}
	if r.exit < 0 {
		r.stderr += "node: " + err.Error()
	}
	return r
}

// container lays out the pod's volumes and resolves its args and env.
func (n *node) container(ctx context.Context, pod *corev1.Pod) (container, error) {
	if len(pod.Spec.Containers) != 1 || len(pod.Spec.InitContainers) != 0 {
		return container{}, errors.New("want a pod of one container")
	}
	spec := pod.Spec.Containers[0]
	if len(spec.Command) != 0 {
		return container{}, fmt.Errorf("command %q: the image has only its entry point", spec.Command)
	}
	var c container
	mounts := make(map[string]string) // folder by mount path
	for _, m := range spec.VolumeMounts {
		i := slices.IndexFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name })
		if i < 0 {
			return container{}, fmt.Errorf("volume %q of mount %q: not found", m.Name, m.MountPath)
		}
		dir := filepath.Join(n.dir, string(pod.UID), m.Name)
		if err := n.volume(ctx, pod, pod.Spec.Volumes[i].VolumeSource, dir); err != nil {
			return container{}, fmt.Errorf("volume %q: %w", m.Name, err)
		}
		mounts[m.MountPath] = filepath.Join(dir, m.SubPath)
	}
	// local maps a path, or a flag's value that is a path.
	local := func(s string) string {
		flag, path := "", s
		if strings.HasPrefix(s, "-") {
			flag, path, _ = strings.Cut(s, "=")
			flag += "="
		}
		for mount, dir := range mounts {
			if rest, ok := strings.CutPrefix(path, mount); ok && (rest == "" || rest[0] == '/') {
				return flag + dir + rest
			}
		}
		return s
	}
	dir := filepath.Join(n.dir, string(pod.UID), "no-service-account")
	if d, ok := mounts[serviceAccountDir]; ok {
		dir = d
		n.mu.Lock()
		token := n.tokens[pod.Namespace]
		n.mu.Unlock()
		if token != "" {
			if err := os.WriteFile(filepath.Join(dir, "token"), []byte(token), 0o600); err != nil {
				return container{}, err
			}
		}
	}
	c.mount = dir
	env, err := n.environment(ctx, pod, spec)
	if err != nil {
		return container{}, err
	}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		c.env = append(c.env, k+"="+local(env[k]))
	}
	for _, a := range spec.Args {
		c.args = append(c.args, local(expand(a, env)))
	}
	c.args = append(c.args, "--service-account-dir="+dir)
	return c, nil
}

var reference = regexp.MustCompile(`\$\$|\$\([-._a-zA-Z][-._a-zA-Z0-9]*\)`)

// expand replaces $(NAME) as the kubelet does: $$ is a dollar sign, and what is
// not defined stays.
func expand(s string, env map[string]string) string {
	return reference.ReplaceAllStringFunc(s, func(m string) string {
		if m == "$$" {
			return "$"
		}
		if v, ok := env[m[2:len(m)-1]]; ok {
			return v
		}
		return m
	})
}

// environment returns what the kubelet would put in the container's environment.
func (n *node) environment(ctx context.Context, pod *corev1.Pod, spec corev1.Container) (map[string]string, error) {
	env := map[string]string{
		"PATH":                    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME":                    "/",
		"HOSTNAME":                pod.Name,
		"KUBERNETES_SERVICE_HOST": "127.0.0.1",
		"KUBERNETES_SERVICE_PORT": strconv.Itoa(n.cp.port),
	}
	for _, from := range spec.EnvFrom {
		var data map[string][]byte
		var err error
		switch {
		case from.SecretRef != nil:
			data, err = n.secret(ctx, pod.Namespace, from.SecretRef.Name, from.SecretRef.Optional)
		case from.ConfigMapRef != nil:
			data, err = n.configMap(ctx, pod.Namespace, from.ConfigMapRef.Name, from.ConfigMapRef.Optional)
		}
		if err != nil {
			return nil, err
		}
		for k, v := range data {
			env[from.Prefix+k] = string(v)
		}
	}
	for _, e := range spec.Env {
		if e.ValueFrom == nil {
			env[e.Name] = expand(e.Value, env)
			continue
		}
		var data map[string][]byte
		var key string
		var optional *bool
		var err error
		switch from := e.ValueFrom; {
		case from.SecretKeyRef != nil:
			key, optional = from.SecretKeyRef.Key, from.SecretKeyRef.Optional
			data, err = n.secret(ctx, pod.Namespace, from.SecretKeyRef.Name, optional)
		case from.ConfigMapKeyRef != nil:
			key, optional = from.ConfigMapKeyRef.Key, from.ConfigMapKeyRef.Optional
			data, err = n.configMap(ctx, pod.Namespace, from.ConfigMapKeyRef.Name, optional)
		case from.FieldRef != nil:
			key = from.FieldRef.FieldPath
			data, err = podField(pod, key)
		default:
			err = errors.New("source not known to this node")
		}
		if err != nil {
			return nil, fmt.Errorf("env %s: %w", e.Name, err)
		}
		if v, ok := data[key]; ok {
			env[e.Name] = string(v)
		} else if optional == nil || !*optional {
			return nil, fmt.Errorf("env %s: key %q not found", e.Name, key)
		}
	}
	return env, nil
}

// podField returns the downward API's value of path, keyed by it.
func podField(pod *corev1.Pod, path string) (map[string][]byte, error) {
	fields := map[string]string{
		"metadata.name":           pod.Name,
		"metadata.namespace":      pod.Namespace,
		"metadata.uid":            string(pod.UID),
		"spec.serviceAccountName": pod.Spec.ServiceAccountName,
	}
	v, ok := fields[path]
	if !ok {
		return nil, fmt.Errorf("field %q not known to this node", path)
	}
	return map[string][]byte{path: []byte(v)}, nil
}

func (n *node) secret(ctx context.Context, namespace, name string, optional *bool) (map[string][]byte, error) {
	s, err := n.cp.client.CoreV1().Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		if optional != nil && *optional {
			return nil, nil
		}
		return nil, err
	}
	return s.Data, nil
}

func (n *node) configMap(ctx context.Context, namespace, name string, optional *bool) (map[string][]byte, error) {
	m, err := n.cp.client.CoreV1().ConfigMaps(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		if optional != nil && *optional {
			return nil, nil
		}
		return nil, err
	}
	data := make(map[string][]byte)
	for k, v := range m.Data {
		data[k] = []byte(v)
	}
	return data, nil
}

// volume fills dir with what the volume holds.
func (n *node) volume(ctx context.Context, pod *corev1.Pod, source corev1.VolumeSource, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// write writes data under its keys, or under the items' paths.
	write := func(data map[string][]byte, items []corev1.KeyToPath) error {
		if items == nil {
			for k := range data {
				items = append(items, corev1.KeyToPath{Key: k, Path: k})
			}
		}
		for _, item := range items {
			v, ok := data[item.Key]
			if !ok {
				return fmt.Errorf("key %q not found", item.Key)
			}
			path := filepath.Join(dir, item.Path)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				return err
			}
			if err := os.WriteFile(path, v, 0o600); err != nil {
				return err
			}
		}
		return nil
	}
	switch {
	case source.EmptyDir != nil:
		return nil
	case source.Secret != nil:
		data, err := n.secret(ctx, pod.Namespace, source.Secret.SecretName, source.Secret.Optional)
		if err != nil {
			return err
		}
		return write(data, source.Secret.Items)
	case source.ConfigMap != nil:
		data, err := n.configMap(ctx, pod.Namespace, source.ConfigMap.Name, source.ConfigMap.Optional)
		if err != nil {
			return err
		}
		return write(data, source.ConfigMap.Items)
	case source.Projected == nil:
		return errors.New("kind not known to this node")
	}
	for _, p := range source.Projected.Sources {
		var err error
		switch {
		case p.ServiceAccountToken != nil:
			var token string
			if token, err = n.token(ctx, pod, p.ServiceAccountToken); err == nil {
				err = write(map[string][]byte{"token": []byte(token)}, []corev1.KeyToPath{{Key: "token", Path: p.ServiceAccountToken.Path}})
			}
		case p.ConfigMap != nil:
			var data map[string][]byte
			if data, err = n.configMap(ctx, pod.Namespace, p.ConfigMap.Name, p.ConfigMap.Optional); err == nil {
				err = write(data, p.ConfigMap.Items)
			}
		case p.Secret != nil:
			var data map[string][]byte
			if data, err = n.secret(ctx, pod.Namespace, p.Secret.Name, p.Secret.Optional); err == nil {
				err = write(data, p.Secret.Items)
			}
		case p.DownwardAPI != nil:
			for _, item := range p.DownwardAPI.Items {
				var data map[string][]byte
				if data, err = podField(pod, item.FieldRef.FieldPath); err == nil {
					err = write(data, []corev1.KeyToPath{{Key: item.FieldRef.FieldPath, Path: item.Path}})
				}
			}
		default:
			err = errors.New("source not known to this node")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// token asks the API server for a token of the pod's service account, bound to
// the pod, as the kubelet does.
func (n *node) token(ctx context.Context, pod *corev1.Pod, p *corev1.ServiceAccountTokenProjection) (string, error) {
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: p.ExpirationSeconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}
	if p.Audience != "" {
		request.Spec.Audiences = []string{p.Audience}
	}
	answer, err := n.cp.client.CoreV1().ServiceAccounts(pod.Namespace).CreateToken(ctx, pod.Spec.ServiceAccountName, request, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	return answer.Status.Token, nil
}
