#!/bin/bash
# Installs what building, running and testing csvfs need on Debian: system packages and, where there is none or one
# too old, the Rust toolchain. Does nothing, quickly, when all is there. The package lists are fetched once, and only
# when something is missing.
#
#   scripts/deps.sh [guests]      with what `make test-vm` needs besides
set -euo pipefail

PACKAGES=(
    # build
    build-essential pkg-config libsmbclient-dev ca-certificates curl git
    # run
    samba smbclient e2fsprogs xfsprogs fuse3 iproute2 mount util-linux
    # tests of resource types
    bind9 bind9-dnsutils resource-agents
    # lab, tests, benchmarks, virtual machine demo
    acl attr busybox-static cpio fio kmod procps psmisc qemu-system-x86 qemu-utils xz-utils zstd
)
RUST_MIN=1.88

if [[ ${1:-} == guests ]]; then
    # QEMU's iSCSI initiator.
    PACKAGES+=(qemu-block-extra dmsetup)
fi

# Samba's module catia is in a package of its own up to Debian 12, and in samba itself from 13 on.
if (. /etc/os-release && [[ ${ID:-} == debian && ${VERSION_ID:-99} -lt 13 ]]); then
    PACKAGES+=(samba-vfs-modules)
fi

missing=()
for package in "${PACKAGES[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [[ $status == installed ]] || missing+=("$package")
done

if ((${#missing[@]})); then
    echo "deps: installing ${missing[*]}" >&2
    as_root=()
    if ((EUID != 0)); then
        command -v sudo >/dev/null || { echo "deps: run this as root, packages are missing: ${missing[*]}" >&2; exit 1; }
        as_root=(sudo)
    fi
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    # Samba's own services are not wanted: csvfs starts a private smbd, and only where it coordinates a volume.
    if ! {
        "${as_root[@]}" apt-get update -q &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
            apt-get install -y -q --no-install-recommends "${missing[@]}"
    } >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        echo "deps: could not install ${missing[*]}; the lines above say why" >&2
        exit 1
    fi
fi

PATH=$PATH:$HOME/.cargo/bin
have=$(rustc --version 2>/dev/null | awk '{print $2}' || true)
if [[ -z $have || $(printf '%s\n' "$RUST_MIN" "$have" | sort -V | head -n 1) != "$RUST_MIN" ]]; then
    echo "deps: installing Rust (found: ${have:-none}, needed: $RUST_MIN)" >&2
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
        sh -s -- -y -q --no-modify-path --profile minimal --component rustfmt --component clippy
fi
if ! command -v cargo-fmt >/dev/null || ! command -v cargo-clippy >/dev/null; then
    rustup component add rustfmt clippy
fi
