// Package standin holds stand-ins for the services that ecr-refresher talks to: Amazon ECR, AWS STS, the EKS Pod Identity
// agent, the EC2 instance metadata service and the Kubernetes API server. Each checks what the real service checks and
// answers, errors included, as the real one does. It uses no AWS SDK and no Kubernetes library, so that it is an
// independent check of the program.
package standin

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// CA is a throwaway certificate authority (ECDSA P-256).
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes an authority that is valid from a day ago for ten years.
func NewCA() (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serialNumber(),
		Subject:               pkix.Name{CommonName: "stand-in CA " + newUUID()[:8]},
		NotBefore:             time.Now().Add(-24 * time.Hour),
		NotAfter:              time.Now().AddDate(10, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &CA{cert: cert, key: key}, nil
}

// PEM returns the authority's own certificate.
func (c *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})
}

// CertOptions describes a server certificate. Hosts are DNS names or IP addresses. Zero times mean from an hour ago and
// until a day from now.
type CertOptions struct {
	Hosts               []string
	NotBefore, NotAfter time.Time
}

// Certificate issues a server certificate.
func (c *CA) Certificate(o CertOptions) (tls.Certificate, error) {
	if o.NotBefore.IsZero() {
		o.NotBefore = time.Now().Add(-time.Hour)
	}
	if o.NotAfter.IsZero() {
		o.NotAfter = time.Now().Add(24 * time.Hour)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: serialNumber(),
		Subject:      pkix.Name{CommonName: "stand-in"},
		NotBefore:    o.NotBefore,
		NotAfter:     o.NotAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, host := range o.Hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, key.Public(), c.key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

func serialNumber() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] &= 0x7f // RFC 5280, section 4.1.2.2: positive
	return new(big.Int).SetBytes(b)
}

// newUUID returns a random (version 4) UUID.
func newUUID() string {
	b := make([]byte, 16)
	rand.Read(b)
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Start serves h over TLS on a free port of 127.0.0.1. It speaks HTTP/1.1, so that an Intercept may hijack the connection.
func Start(h http.Handler, cert tls.Certificate) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	s.StartTLS()
	return s
}

// StartHTTP serves h over plain HTTP on a free port of 127.0.0.1.
func StartHTTP(h http.Handler) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	return s
}

// Intercept is asked before a stand-in's normal answer, with the 1-based number of the request. It returns true when it
// answered the request itself. The request's body can still be read.
type Intercept func(n int, w http.ResponseWriter, r *http.Request) bool

// Request is a request as a stand-in saw it.
type Request struct {
	Method string
	URL    *url.URL
	Header http.Header
	Body   []byte
}

// maxBody is kube-apiserver's limit for a request's body, in bytes. No request to another stand-in comes near it.
const maxBody = 3 << 20

// recorder keeps the requests that a stand-in got.
type recorder struct {
	mu       sync.Mutex
	requests []Request
}

// Requests returns every request so far, the intercepted ones included.
func (rec *recorder) Requests() []Request {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return append([]Request(nil), rec.requests...)
}

// begin records r, returns its body, at most maxBody+1 bytes of it, and tells whether intercept answered r.
func (rec *recorder) begin(w http.ResponseWriter, r *http.Request, intercept Intercept) (body []byte, done bool) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	u := *r.URL
	rec.mu.Lock()
	rec.requests = append(rec.requests, Request{r.Method, &u, r.Header.Clone(), body})
	n := len(rec.requests)
	rec.mu.Unlock()
	if err != nil {
		panic(http.ErrAbortHandler) // the client went away in the middle of its request
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	return body, intercept != nil && intercept(n, w, r)
}

// WriteServiceAccount lays out token, ca.crt and namespace in dir as the kubelet does: links to files in a folder with a
// time stamp, which a link ..data names. Calling it again changes all three in one atomic step.
//
// See https://pkg.go.dev/k8s.io/kubernetes/pkg/volume/util#AtomicWriter.
func WriteServiceAccount(dir, token, namespace string, ca []byte) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	old, _ := os.Readlink(filepath.Join(dir, "..data"))
	stamped, err := os.MkdirTemp(dir, time.Now().UTC().Format("..2006_01_02_15_04_05."))
	if err != nil {
		return err
	}
	if err := os.Chmod(stamped, 0o755); err != nil {
		return err
	}
	files := map[string][]byte{"token": []byte(token), "namespace": []byte(namespace), "ca.crt": ca}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(stamped, name), content, 0o644); err != nil {
			return err
		}
	}
	next := filepath.Join(dir, "..data_tmp")
	if err := os.Symlink(filepath.Base(stamped), next); err != nil {
		return err
	}
	if err := os.Rename(next, filepath.Join(dir, "..data")); err != nil {
		return err
	}
	for name := range files {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil && !os.IsExist(err) {
			return err
		}
	}
	if old == "" {
		return nil
	}
	return os.RemoveAll(filepath.Join(dir, old))
}
