package cluster

import (
	"bytes"
	"io"
	"net/http"
	"net/url"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"ecr-refresher/testdata/standin"
)

// With aws.roleArn the chart mounts a token of its own. STS trusts it as far as
// the cluster's issuer vouches for it: here the API server is asked.
func TestRoleArnMountsATokenForSTSAlone(t *testing.T) {
	withHelms(t, func(e *environment) {
		const role = "arn:aws:iam::123456789012:role/puller"
		issued := standin.Key{ID: "ASIAIOSFODNN7EXAMPLE", Secret: "secret of the session", SessionToken: "session token"}
		review := func(token string, audiences ...string) authenticationv1.TokenReviewStatus {
			r, err := cluster.client.AuthenticationV1().TokenReviews().Create(e.Context(), &authenticationv1.TokenReview{
				Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: audiences}}, metav1.CreateOptions{})
			if err != nil {
				e.Error(err)
				return authenticationv1.TokenReviewStatus{}
			}
			return r.Status
		}
		e.ecr.Load().Allow(issued)
		e.sts = func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				e.Error(err)
			}
			form, err := url.ParseQuery(string(body))
			if err != nil {
				e.Error(err)
			}
			token := form.Get("WebIdentityToken")
			sts := &standin.STS{RoleArn: role, Issue: issued, WebIdentityToken: token}
			status := review(token, "sts.amazonaws.com")
			if want := "system:serviceaccount:" + e.namespace + ":" + fullname + "-serviceaccount"; !status.Authenticated || status.User.Username != want {
				e.Errorf("the token's review: %+v", status)
				sts.WebIdentityToken = "another"
			}
			if review(token).Authenticated {
				e.Error("the token for STS opens the API server, too")
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			sts.ServeHTTP(w, r)
		}
		e.install("--set", "aws.accessKeyID=,aws.secretAccessKey=", "--set", "aws.roleArn="+role)
		e.wantContent(e.secret(), "first-password")
	})
}
