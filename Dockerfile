# syntax=docker/dockerfile:1

# The compiler runs on the builder's own platform and cross-compiles: no emulation.
FROM --platform=$BUILDPLATFORM golang:1.26.8 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY *.go ./
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=0.1.0
# HTTP/2 is left out of net/http (240 kB): two requests to two hosts gain nothing from it.
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -tags nethttpomithttp2 \
      -ldflags "-s -w -X main.version=$VERSION" -o /ecr-refresher .

# One file: the CA roots are in the binary. A bundle that is mounted wins, by SSL_CERT_FILE or AWS_CA_BUNDLE.
FROM scratch
COPY --from=build /ecr-refresher /ecr-refresher
USER 65532:65532
ENTRYPOINT ["/ecr-refresher"]
