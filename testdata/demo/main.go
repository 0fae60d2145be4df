// Command demo shows ecr-refresher at work on this machine alone: it builds the program, starts stand-ins for AWS and
// the Kubernetes API on loopback, lays out a service-account mount as the kubelet does, and runs the program in it as a
// CronJob's pod would: once to create the Secret, once to patch it in place, once to fail.
//
//	go run ./testdata/demo [-source keys|irsa|pod-identity|imds]
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"ecr-refresher/testdata/standin"
)

const (
	namespace = "shop"
	secret    = "ecr-credentials"
	region    = "eu-central-1"
)

func main() {
	source := flag.String("source", "keys", "credential source: keys, irsa, pod-identity or imds")
	flag.Parse()
	if err := demo(*source); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func demo(source string) error {
	dir, err := os.MkdirTemp("", "ecr-refresher-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "ecr-refresher")
	build := exec.Command("go", "build", "-trimpath", "-tags", "nethttpomithttp2", "-ldflags", "-s -w", "-o", program, "ecr-refresher")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}

	ca, err := standin.NewCA()
	if err != nil {
		return err
	}
	cert, err := ca.Certificate(standin.CertOptions{Hosts: []string{"127.0.0.1"}})
	if err != nil {
		return err
	}
	mount, bundle := filepath.Join(dir, "serviceaccount"), filepath.Join(dir, "aws-ca.pem")
	token := filepath.Join(dir, "aws-token")
	err = errors.Join(
		standin.WriteServiceAccount(mount, "service-account-token", namespace, ca.PEM()),
		os.WriteFile(bundle, ca.PEM(), 0o600),
		os.WriteFile(token, []byte("projected-token"), 0o600))
	if err != nil {
		return err
	}

	kubernetes := standin.NewKubernetes(namespace)
	kubernetes.SetTokens("service-account-token")
	role := standin.Rule{Namespace: namespace, Verbs: []string{"patch", "create"}, ResourceNames: []string{secret}}
	kubernetes.SetRules(role)
	api := standin.Start(kubernetes, cert)
	defer api.Close()
	ecr := &standin.ECR{Region: region, Account: "123456789012", Password: "first-password-from-ecr"}
	ecrServer := standin.Start(ecr, cert)
	defer ecrServer.Close()

	apiURL, err := url.Parse(api.URL)
	if err != nil {
		return err
	}
	env := []string{
		"KUBERNETES_SERVICE_HOST=" + apiURL.Hostname(),
		"KUBERNETES_SERVICE_PORT=" + apiURL.Port(),
		"AWS_REGION=" + region,
		"AWS_ENDPOINT_URL_ECR=" + ecrServer.URL,
		"AWS_CA_BUNDLE=" + bundle,
	}
	session := standin.Key{ID: "ASIAEXAMPLE", Secret: "temporary-secret", SessionToken: "temporary-session-token"}
	ecr.Allow(session)
	switch source {
	case "keys":
		key := standin.Key{ID: "AKIAEXAMPLE", Secret: "long-lived-secret"}
		ecr.Allow(key)
		env = append(env, "AWS_ACCESS_KEY_ID="+key.ID, "AWS_SECRET_ACCESS_KEY="+key.Secret)
	case "irsa":
		const arn = "arn:aws:iam::123456789012:role/ecr-refresher"
		sts := standin.Start(&standin.STS{Region: region, RoleArn: arn, WebIdentityToken: "projected-token", Issue: session}, cert)
		defer sts.Close()
		env = append(env, "AWS_ROLE_ARN="+arn, "AWS_WEB_IDENTITY_TOKEN_FILE="+token, "AWS_ENDPOINT_URL_STS="+sts.URL)
	case "pod-identity":
		agent := standin.StartHTTP(&standin.PodIdentity{Token: "projected-token", Issue: session})
		defer agent.Close()
		env = append(env, "AWS_CONTAINER_CREDENTIALS_FULL_URI="+agent.URL+"/v1/credentials", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE="+token)
	case "imds":
		imds := standin.StartHTTP(&standin.IMDS{Role: "node-role", Issue: session})
		defer imds.Close()
		env = append(env, "AWS_EC2_METADATA_SERVICE_ENDPOINT="+imds.URL)
	default:
		return fmt.Errorf("invalid flag -source: %q is none of keys, irsa, pod-identity, imds", source)
	}

	run := func() {
		cmd := exec.Command(program, "--secret", secret, "--service-account-dir", mount)
		cmd.Env = env
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		err := cmd.Run()
		for line := range strings.Lines(stderr.String()) {
			fmt.Printf("  stderr  %s", strings.NewReplacer(apiURL.Host, "10.43.0.1:443", mount, "/var/run/secrets/kubernetes.io/serviceaccount").Replace(line))
		}
		fmt.Printf("  exit    %d\n", cmd.ProcessState.ExitCode())
		if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
			fmt.Println("  error  ", err)
		}
	}

	fmt.Printf("1. No Secret %s/%s yet; ECR hands out a token. ecr-refresher --secret %s\n", namespace, secret, secret)
	run()
	show(kubernetes)
	fmt.Println("\n2. Six hours later: ECR hands out another token, the Secret is patched in place.")
	ecr.Password = "second-password-from-ecr"
	run()
	show(kubernetes)
	fmt.Println("\n3. Somebody narrowed the Role: the run says so, and the Secret stays as it was.")
	kubernetes.SetRules(standin.Rule{Namespace: namespace, Verbs: []string{"get"}, ResourceNames: []string{secret}})
	run()
	show(kubernetes)
	return nil
}

// show prints what the cluster holds, the password shortened.
func show(kubernetes *standin.Kubernetes) {
	object := kubernetes.Secret(namespace, secret)
	if object == nil {
		fmt.Println("  Secret  none")
		return
	}
	var s struct {
		Type     string
		Metadata struct {
			UID, ResourceVersion string
			Annotations          map[string]string
		}
		Data map[string][]byte
	}
	b, err := json.Marshal(object)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	var config struct {
		Auths map[string]struct{ Username, Password, Auth string }
	}
	if err == nil {
		err = json.Unmarshal(s.Data[".dockerconfigjson"], &config)
	}
	if err != nil {
		fmt.Println("  Secret  unreadable:", err)
		return
	}
	fmt.Printf("  Secret  type %s, uid %.8s, resourceVersion %s, expires-at %s\n", s.Type, s.Metadata.UID, s.Metadata.ResourceVersion, s.Metadata.Annotations["ecr-refresher/expires-at"])
	for host, a := range config.Auths {
		decoded, _ := base64.StdEncoding.DecodeString(a.Auth)
		fmt.Printf("  auths   %s: username %s, password %.8s..., auth base64(%.12s...)\n", host, a.Username, a.Password, decoded)
	}
}
