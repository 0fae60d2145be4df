package cluster

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// issuer is the `iss` of every service-account token of the control plane.
const issuer = "https://kubernetes.default.svc"

// controlPlane is an etcd and a kube-apiserver on loopback.
type controlPlane struct {
	dir        string
	paths      map[string]string // of the tools
	port       int               // of the API server
	ca         []byte            // PEM, what a pod finds as ca.crt
	admin      *rest.Config
	client     *kubernetes.Clientset
	kubeconfig string        // file, for kubectl and Helm
	signer     crypto.Signer // signs service-account tokens
	auditLog   string        // file, one JSON event a line

	etcdURL, etcdPeerURL string
	etcd, apiServer      *process
}

// startControlPlane starts both programs and waits until the API server is
// ready. What it keeps, logs included, lies below dir.
func startControlPlane(ctx context.Context, dir string, paths map[string]string) (*controlPlane, error) {
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	cp := &controlPlane{
		dir:         dir,
		paths:       paths,
		port:        ports[0],
		kubeconfig:  filepath.Join(dir, "kubeconfig"),
		auditLog:    filepath.Join(dir, "audit.log"),
		etcdURL:     "http://127.0.0.1:" + strconv.Itoa(ports[1]),
		etcdPeerURL: "http://127.0.0.1:" + strconv.Itoa(ports[2]),
	}
	if err := cp.writeFiles(); err != nil {
		return nil, err
	}
	cp.client, err = kubernetes.NewForConfig(cp.admin)
	if err != nil {
		return nil, err
	}
	if err := cp.startEtcd(); err != nil {
		return nil, err
	}
	if err := cp.startAPIServer(ctx); err != nil {
		return nil, errors.Join(err, cp.stop())
	}
	return cp, nil
}

func (cp *controlPlane) startEtcd() error {
	var err error
	cp.etcd, err = startProcess(filepath.Join(cp.dir, "etcd.log"), cp.paths["etcd"],
		"--name=default",
		"--data-dir="+filepath.Join(cp.dir, "etcd"),
		"--listen-client-urls="+cp.etcdURL,
		"--advertise-client-urls="+cp.etcdURL,
		"--listen-peer-urls="+cp.etcdPeerURL,
		"--initial-advertise-peer-urls="+cp.etcdPeerURL,
		"--initial-cluster=default="+cp.etcdPeerURL,
		"--unsafe-no-fsync",
		"--log-level=warn",
	)
	return err
}

// startAPIServer starts kube-apiserver and returns once it is ready.
func (cp *controlPlane) startAPIServer(ctx context.Context) error {
	file := func(name string) string { return filepath.Join(cp.dir, name) }
	var err error
	cp.apiServer, err = startProcess(file("kube-apiserver.log"), cp.paths["kube-apiserver"],
		"--etcd-servers="+cp.etcdURL,
		"--bind-address=127.0.0.1",
		"--advertise-address=127.0.0.1",
		"--endpoint-reconciler-type=none",
		"--secure-port="+strconv.Itoa(cp.port),
		"--service-cluster-ip-range=10.0.0.0/24",
		"--cert-dir="+cp.dir,
		"--tls-cert-file="+file("server.crt"),
		"--tls-private-key-file="+file("server.key"),
		"--client-ca-file="+file("ca.crt"),
		"--authorization-mode=RBAC",
		"--service-account-issuer="+issuer,
		"--service-account-signing-key-file="+file("signer.key"),
		"--service-account-key-file="+file("signer.key"),
		"--audit-policy-file="+file("audit.yaml"),
		"--audit-log-path="+cp.auditLog,
		"--audit-log-mode=blocking-strict",
		"--audit-log-maxsize=1024",
	)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	for {
		err := cp.client.RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
		if err == nil {
			return nil
		}
		select {
		case <-cp.apiServer.done:
			return fmt.Errorf("kube-apiserver ended: %w", cp.apiServer.err)
		case <-ctx.Done():
			return fmt.Errorf("kube-apiserver is not ready: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// stop ends both programs, the API server first.
func (cp *controlPlane) stop() error {
	var errs []error
	for _, p := range []*process{cp.apiServer, cp.etcd} {
		if p != nil {
			errs = append(errs, p.stop())
		}
	}
	return errors.Join(errs...)
}

// logTails returns the ends of both programs' logs.
func (cp *controlPlane) logTails() string {
	var b strings.Builder
	for _, name := range []string{"etcd.log", "kube-apiserver.log"} {
		data, _ := os.ReadFile(filepath.Join(cp.dir, name))
		fmt.Fprintf(&b, "--- end of %s\n", name)
		for line := range strings.Lines(tail(string(data), 8)) {
			fmt.Fprintf(&b, "%.200s\n", strings.TrimSpace(line))
		}
	}
	return b.String()
}

// writeFiles makes the certificates, the audit policy and the kubeconfig.
func (cp *controlPlane) writeFiles() error {
	caKey, err := newKey()
	if err != nil {
		return err
	}
	ca := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "cluster"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return err
	}
	cp.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	serverCert, serverKey, err := issue(ca, caKey, &x509.Certificate{
		SerialNumber: big.NewInt(2),
		Subject:      pkix.Name{CommonName: "kube-apiserver"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return err
	}
	adminCert, adminKey, err := issue(ca, caKey, &x509.Certificate{
		SerialNumber: big.NewInt(3),
		Subject:      pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}},
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return err
	}
	cp.signer, err = newKey()
	if err != nil {
		return err
	}
	signerKey, err := keyPEM(cp.signer)
	if err != nil {
		return err
	}
	server := "https://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(cp.port))
	cp.admin = &rest.Config{
		Host:            server,
		TLSClientConfig: rest.TLSClientConfig{CAData: cp.ca, CertData: adminCert, KeyData: adminKey},
		QPS:             -1,
	}
	b64 := base64.StdEncoding.EncodeToString
	// JSON is YAML too.
	kubeconfig, err := json.Marshal(map[string]any{
		"apiVersion":      "v1",
		"kind":            "Config",
		"current-context": "admin",
		"clusters":        []any{map[string]any{"name": "admin", "cluster": map[string]any{"server": server, "certificate-authority-data": b64(cp.ca)}}},
		"users":           []any{map[string]any{"name": "admin", "user": map[string]any{"client-certificate-data": b64(adminCert), "client-key-data": b64(adminKey)}}},
		"contexts":        []any{map[string]any{"name": "admin", "context": map[string]any{"cluster": "admin", "user": "admin"}}},
	})
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		"ca.crt":     cp.ca,
		"server.crt": serverCert,
		"server.key": serverKey,
		"signer.key": signerKey,
		"kubeconfig": kubeconfig,
		"audit.yaml": []byte("apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata}]\n"),
	} {
		if err := os.WriteFile(filepath.Join(cp.dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func newKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

func keyPEM(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key.(*ecdsa.PrivateKey))
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

// issue completes and signs template; it returns the certificate and its key as PEM.
func issue(ca *x509.Certificate, caKey crypto.Signer, template *x509.Certificate) (cert, key []byte, err error) {
	signer, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	template.NotBefore, template.NotAfter = ca.NotBefore, ca.NotAfter
	template.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, ca, signer.Public(), caKey)
	if err != nil {
		return nil, nil, err
	}
	key, err = keyPEM(signer)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key, err
}

// signToken returns a service-account token with these claims, signed as the
// API server signs its own.
func (cp *controlPlane) signToken(claims map[string]any) (string, error) {
	enc := base64.RawURLEncoding.EncodeToString
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	signed := enc([]byte(`{"alg":"ES256","typ":"JWT"}`)) + "." + enc(payload)
	h := crypto.SHA256.New()
	io.WriteString(h, signed)
	r, s, err := ecdsa.Sign(rand.Reader, cp.signer.(*ecdsa.PrivateKey), h.Sum(nil))
	if err != nil {
		return "", err
	}
	return signed + "." + enc(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)), nil
}

// httpClient trusts the API server and sends no credentials.
func (cp *controlPlane) httpClient() *http.Client {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cp.ca)
	return &http.Client{
		Timeout:   time.Minute,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}},
	}
}

// freePorts returns n ports of the loopback address that nobody listens on.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

// process is a server of the control plane.
type process struct {
	cmd   *exec.Cmd
	leash io.Closer
	done  chan struct{} // closed once the program has ended
	err   error         // how it ended; valid after done
}

// supervised holds, in the environment of a re-executed test binary, that it is
// to run its arguments as a program, until its standard input ends. So no server
// outlives the tests, even when go test kills them.
const supervised = "CLUSTER_SUPERVISED"

// startProcess runs a program with its output appended to log.
func startProcess(log, path string, args ...string) (*process, error) {
	out, err := os.OpenFile(log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(self, append([]string{path}, args...)...), done: make(chan struct{})}
	p.cmd.Env = []string{supervised + "=1", "HOME=" + filepath.Dir(log), "PATH=" + os.Getenv("PATH")}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	if p.leash, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// stop ends the program and waits for it.
func (p *process) stop() error {
	p.leash.Close()
	select {
	case <-p.done:
		return nil
	case <-time.After(30 * time.Second):
		return fmt.Errorf("%s did not end", p.cmd.Args[1])
	}
}

// supervise is the other end of startProcess. It returns the exit code.
func supervise(args []string) int {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = []string{"HOME=" + os.Getenv("HOME"), "PATH=" + os.Getenv("PATH")}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		// Nothing on disk is wanted any more, so there is nothing to wait for.
		cmd.Process.Kill()
	}()
	if err := cmd.Wait(); err != nil {
		return 1
	}
	return 0
}

// tail returns the last n lines of s.
func tail(s string, n int) string {
	lines := bytes.Split(bytes.TrimSpace([]byte(s)), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-n):], []byte("\n")))
}
