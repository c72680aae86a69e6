"""What a pod must find in the cluster: names, its own identity, the S3 server. Ends at the first that it does not."""

import json
import socket
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

import boto3
from botocore.exceptions import ClientError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def require(name: str, expected: object, found: object) -> None:
    print("ok  " if found == expected else "FAIL", name, found, flush=True)
    if found != expected:
        sys.exit(f"{name}: expected {expected}, found {found}")


def api_refusal(path: str) -> str:
    """The API server's message when it refuses this pod's account, which names the account."""
    request = urllib.request.Request(
        f"https://kubernetes.default.svc{path}",
        headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"},
    )
    try:
        urllib.request.urlopen(request, context=ssl.create_default_context(cafile=ACCOUNT / "ca.crt"))
    except urllib.error.HTTPError as error:
        return json.loads(error.read())["message"]
    return "not refused"


def main() -> None:
    require("DNS: the API server's Service", "10.96.0.1", socket.gethostbyname("kubernetes.default.svc.cluster.local"))
    message = api_refusal("/api/v1/namespaces/selftest/secrets")
    require("ServiceAccount: known to the API server", True, "system:serviceaccount:selftest:default" in message)

    s3 = boto3.client("s3", endpoint_url="http://s3.s3.svc")
    s3.put_object(Bucket="selftest", Key="k", Body=b"v", IfNoneMatch="*")
    require("S3: object", b"v", s3.get_object(Bucket="selftest", Key="k")["Body"].read())
    try:
        s3.put_object(Bucket="selftest", Key="k", Body=b"w", IfNoneMatch="*")
        status = 200
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    require("S3: a create-only write of an existing key is refused", 412, status)


main()
