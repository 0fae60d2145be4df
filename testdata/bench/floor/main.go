// Command floor does the refresher's two TLS exchanges with nothing but net/http, and checks no more than their success. No
// Go program can get the same result for much less, so the benchmark measures the refresher against it.
//
//	floor SECRET SERVICE-ACCOUNT-DIR
package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1)
	}
}

func run(secret, mount string) error {
	host, token, expiresAt, err := authorizationToken()
	if err != nil {
		return err
	}
	decoded, err := base64.StdEncoding.DecodeString(token)
	if err != nil {
		return err
	}
	user, password, _ := strings.Cut(string(decoded), ":")
	config, err := json.Marshal(map[string]any{"auths": map[string]any{
		host: map[string]string{"username": user, "password": password, "auth": token},
	}})
	if err != nil {
		return err
	}
	return patch(secret, mount, config, expiresAt)
}

// authorizationToken calls ECR's GetAuthorizationToken.
func authorizationToken() (host, token string, expiresAt time.Time, err error) {
	client, err := httpClient(os.Getenv("AWS_CA_BUNDLE"))
	if err != nil {
		return "", "", time.Time{}, err
	}
	body := []byte("{}")
	req, err := http.NewRequest(http.MethodPost, os.Getenv("AWS_ENDPOINT_URL_ECR")+"/", bytes.NewReader(body))
	if err != nil {
		return "", "", time.Time{}, err
	}
	req.Header.Set("Content-Type", "application/x-amz-json-1.1")
	req.Header.Set("X-Amz-Target", "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken")
	sign(req, body, time.Now().UTC())
	var out struct {
		AuthorizationData []struct {
			AuthorizationToken string  `json:"authorizationToken"`
			ExpiresAt          float64 `json:"expiresAt"` // epoch seconds
			ProxyEndpoint      string  `json:"proxyEndpoint"`
		} `json:"authorizationData"`
	}
	if err := do(client, req, &out); err != nil {
		return "", "", time.Time{}, err
	}
	data := out.AuthorizationData[0]
	return strings.TrimPrefix(data.ProxyEndpoint, "https://"), data.AuthorizationToken, time.Unix(int64(data.ExpiresAt), 0), nil
}

// sign adds a signature version 4, see
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html.
func sign(req *http.Request, body []byte, now time.Time) {
	date := now.Format("20060102T150405Z")
	req.Header.Set("X-Amz-Date", date)
	const signed = "content-type;host;x-amz-date;x-amz-target"
	canonical := fmt.Sprintf("%s\n/\n\ncontent-type:%s\nhost:%s\nx-amz-date:%s\nx-amz-target:%s\n\n%s\n%x", req.Method,
		req.Header.Get("Content-Type"), req.URL.Host, date, req.Header.Get("X-Amz-Target"), signed, sha256.Sum256(body))
	scope := []string{date[:8], os.Getenv("AWS_REGION"), "ecr", "aws4_request"}
	toSign := fmt.Sprintf("AWS4-HMAC-SHA256\n%s\n%s\n%x", date, strings.Join(scope, "/"), sha256.Sum256([]byte(canonical)))
	key := []byte("AWS4" + os.Getenv("AWS_SECRET_ACCESS_KEY"))
	for _, part := range append(scope, toSign) {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(part))
		key = mac.Sum(nil)
	}
	req.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%s",
		os.Getenv("AWS_ACCESS_KEY_ID"), strings.Join(scope, "/"), signed, hex.EncodeToString(key)))
}

// patch sends the merge patch to the API server of the pod that the environment describes.
func patch(secret, mount string, config []byte, expiresAt time.Time) error {
	client, err := httpClient(filepath.Join(mount, "ca.crt"))
	if err != nil {
		return err
	}
	token, err := os.ReadFile(filepath.Join(mount, "token"))
	if err != nil {
		return err
	}
	namespace, err := os.ReadFile(filepath.Join(mount, "namespace"))
	if err != nil {
		return err
	}
	body, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"annotations": map[string]string{
			"ecr-refresher/expires-at":   expiresAt.UTC().Format(time.RFC3339),
			"ecr-refresher/refreshed-at": time.Now().UTC().Format(time.RFC3339),
		}},
		"type": "kubernetes.io/dockerconfigjson",
		"data": map[string][]byte{".dockerconfigjson": config},
	})
	if err != nil {
		return err
	}
	server := net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))
	u := fmt.Sprintf("https://%s/api/v1/namespaces/%s/secrets/%s?fieldManager=ecr-refresher&fieldValidation=Strict", server,
		url.PathEscape(string(namespace)), url.PathEscape(secret))
	req, err := http.NewRequest(http.MethodPatch, u, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+string(token))
	req.Header.Set("Content-Type", "application/merge-patch+json")
	req.Header.Set("Accept", "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json")
	var object struct{ Kind string }
	return do(client, req, &object)
}

func httpClient(ca string) (*http.Client, error) {
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, errors.New(ca + " holds no certificate")
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}, nil
}

// do sends req and decodes the answer into v.
func do(client *http.Client, req *http.Request, v any) error {
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("HTTP %s: %s", resp.Status, answer)
	}
	return json.Unmarshal(answer, v)
}
