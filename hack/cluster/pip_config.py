#!/usr/bin/env python3
"""Carry the host's pip configuration into an image build: `pip_config.py PIP_CONF`.

A build runs in a root of its own, so a package index, a timeout or a CA bundle that is set on the host
would be lost. They must not go through the Dockerfile or the image's environment either, where they
would stay. So this writes PIP_CONF, one file with all that the host's files and PIP_* variables say,
and prints, one a line, the volumes (`source:destination:ro`) that the build is to mount.
"""

from __future__ import annotations

import configparser
import os
import sys
from pathlib import Path

# pip's own order: later files override earlier ones, the environment overrides all.
FILES = ("/etc/xdg/pip/pip.conf", "/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"  # where Debian's programs look for CAs


def host_config() -> configparser.RawConfigParser:
    config = configparser.RawConfigParser()
    config.read([*map(os.path.expanduser, FILES), os.environ.get("PIP_CONFIG_FILE", os.devnull)])
    if not config.has_section("global"):
        config.add_section("global")
    for name, value in os.environ.items():
        if name.startswith("PIP_") and name != "PIP_CONFIG_FILE":
            config.set("global", name.removeprefix("PIP_").lower().replace("_", "-"), value)
    return config


def main() -> None:
    target = Path(sys.argv[1])
    config = host_config()
    bundle = config.get("global", "cert", fallback=os.environ.get("SSL_CERT_FILE", BUNDLE))
    config.set("global", "cert", BUNDLE)
    with target.open("w") as file:
        config.write(file)

    local = [path for path in config.get("global", "find-links", fallback="").split() if os.path.isdir(path)]
    for source, destination in [(target, "/etc/pip.conf"), (bundle, BUNDLE), *((path, path) for path in local)]:
        print(f"{source}:{destination}:ro")


if __name__ == "__main__":
    main()
