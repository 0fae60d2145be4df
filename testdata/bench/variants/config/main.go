// Command config is the refresher with the AWS SDK's config module, and the refresher's own raw PATCH.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"

	"ecr-refresher/testdata/bench/variants/flow"
)

func main() { flow.Run(write) }

func write(ctx context.Context, s flow.Settings, patch []byte) error {
	ca, err1 := s.Read("ca.crt")
	token, err2 := s.Read("token")
	namespace, err3 := s.Read("namespace")
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(ca)) {
		return errors.New("ca.crt holds no certificate")
	}
	server := net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))
	u := fmt.Sprintf("https://%s/api/v1/namespaces/%s/secrets/%s?fieldManager=ecr-refresher&fieldValidation=Strict", server,
		url.PathEscape(namespace), url.PathEscape(s.Secret))
	req, err := http.NewRequestWithContext(ctx, http.MethodPatch, u, bytes.NewReader(patch))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/merge-patch+json")
	req.Header.Set("Accept", "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json")
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
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
	var object struct{ Kind string }
	return json.Unmarshal(answer, &object)
}
