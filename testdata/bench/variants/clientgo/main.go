// Command clientgo is the refresher with the AWS SDK's config module and with client-go.
package main

import (
	"context"
	"net"
	"os"
	"path/filepath"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"ecr-refresher/testdata/bench/variants/flow"
)

func main() { flow.Run(write) }

// write builds the configuration as rest.InClusterConfig does, which knows one path of the mount only.
func write(ctx context.Context, s flow.Settings, patch []byte) error {
	namespace, err := s.Read("namespace")
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(&rest.Config{
		Host:            "https://" + net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")),
		TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(s.Mount, "ca.crt")},
		BearerTokenFile: filepath.Join(s.Mount, "token"),
	})
	if err != nil {
		return err
	}
	_, err = client.CoreV1().Secrets(namespace).Patch(ctx, s.Secret, types.MergePatchType, patch,
		metav1.PatchOptions{FieldManager: "ecr-refresher", FieldValidation: metav1.FieldValidationStrict})
	return err
}
