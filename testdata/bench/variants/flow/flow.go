// Package flow is what the two variants of the refresher share: flags, log line and docker config, as the refresher has
// them. It leaves out the refresher's checks, so that the variants are rather too small than too large.
package flow

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/spf13/pflag"
	_ "golang.org/x/crypto/x509roots/fallback" // as the refresher: for an image without a CA bundle
)

// Settings are the flags.
type Settings struct{ Secret, Mount string }

// Run gets the token by the SDK's default configuration and hands the merge patch to write.
func Run(write func(ctx context.Context, s Settings, patch []byte) error) {
	var s Settings
	pflag.StringVar(&s.Secret, "secret", "", "the image-pull Secret to patch")
	pflag.StringVar(&s.Mount, "service-account-dir", "/var/run/secrets/kubernetes.io/serviceaccount", "folder with token, ca.crt and namespace")
	timeout := pflag.Duration("timeout", time.Minute, "deadline of the whole run")
	pflag.Parse()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	patch, err := dockerConfigPatch(ctx)
	if err == nil {
		err = write(ctx, s, patch)
	}
	if err != nil {
		log.Error(err.Error())
		os.Exit(1)
	}
	log.Info("secret patched", "secret", s.Secret)
}

func dockerConfigPatch(ctx context.Context) ([]byte, error) {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return nil, err
	}
	out, err := ecr.NewFromConfig(cfg).GetAuthorizationToken(ctx, &ecr.GetAuthorizationTokenInput{})
	if err != nil {
		return nil, err
	}
	if len(out.AuthorizationData) == 0 {
		return nil, errors.New("no authorizationData")
	}
	data := out.AuthorizationData[0]
	token := aws.ToString(data.AuthorizationToken)
	decoded, err := base64.StdEncoding.DecodeString(token)
	if err != nil {
		return nil, err
	}
	user, password, _ := strings.Cut(string(decoded), ":")
	host := strings.TrimPrefix(aws.ToString(data.ProxyEndpoint), "https://")
	docker, err := json.Marshal(map[string]any{"auths": map[string]any{
		host: map[string]string{"username": user, "password": password, "auth": token},
	}})
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]any{
		"metadata": map[string]any{"annotations": map[string]string{
			"ecr-refresher/expires-at":   aws.ToTime(data.ExpiresAt).UTC().Format(time.RFC3339),
			"ecr-refresher/refreshed-at": time.Now().UTC().Format(time.RFC3339),
		}},
		"type": "kubernetes.io/dockerconfigjson",
		"data": map[string][]byte{".dockerconfigjson": docker},
	})
}

// Read returns a file of the service-account mount.
func (s Settings) Read(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(s.Mount, name))
	return strings.TrimSpace(string(b)), err
}
