# The usual recipe of a CronJob: the AWS command line for the token, a shell for the docker config, curl for the patch.
#
#	sh recipe.sh SECRET SERVICE-ACCOUNT-DIR
set -eu
token=$(aws ecr get-login-password --region "$AWS_REGION" --endpoint-url "$AWS_ENDPOINT_URL_ECR")
auth=$(printf 'AWS:%s' "$token" | base64 -w0)
config=$(printf '{"auths":{"%s":{"username":"AWS","password":"%s","auth":"%s"}}}' "$REGISTRY" "$token" "$auth" | base64 -w0)
curl -sSf -o /dev/null --cacert "$2/ca.crt" -X PATCH \
	-H "Authorization: Bearer $(cat "$2/token")" \
	-H "Content-Type: application/merge-patch+json" \
	-d "{\"type\":\"kubernetes.io/dockerconfigjson\",\"data\":{\".dockerconfigjson\":\"$config\"}}" \
	"https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/api/v1/namespaces/$(cat "$2/namespace")/secrets/$1?fieldManager=ecr-refresher"
