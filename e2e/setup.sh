#!/bin/bash
# Installs what the whole-system tests, the demo and the benchmarks need on Debian 12 (or newer), and unpacks the kernel
# that the test guest boots. Says what it does, changes nothing that is already there, and may be run any number of times.
#
#   e2e/setup.sh [test|demo|bench|clusters]      default: test (which includes all that the demo needs)
#
# Needs root for the packages. What it leaves on the machine:
#   - Debian packages (listed below), without recommended ones and without starting a service of theirs;
#   - where the release's own QEMU or libvirt is too old: /etc/apt/sources.list.d/watari-backports.sources, which names the mirror that
#     this machine already uses;
#   - target/e2e/kernel/ in the workspace: vmlinuz and modules of Debian's cloud kernel, unpacked, not installed.
set -euo pipefail

# The oldest major versions whose migration, NBD and reconnect behaviour the project was checked against.
declare -rA major_min=([qemu-system-x86]=10 [qemu-utils]=10 [libvirt-daemon]=11 [libvirt-daemon-driver-qemu]=11 [libvirt-clients]=11)
readonly APT_LOCK_SECONDS=600 # another apt may be at work; waiting beats failing half-way

here=$(cd "$(dirname "$0")" && pwd)
workspace=$(dirname "$here")
cache=${CARGO_TARGET_DIR:-$workspace/target}/e2e

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

profile=${1:-test}
# The guest boots from a kernel file and an initramfs that the harness packs itself: no boot loader, no cpio, no shell.
# A linker and a C compiler are for the Rust build (its TLS library holds C and assembly).
demo_packages=(gcc libc6-dev iproute2 kmod util-linux e2fsprogs procps qemu-system-x86 qemu-utils)
test_packages=(libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients nbdkit libnbd-bin python3-libnbd fio)
bench_packages=(rsync openssh-server openssh-client)
# What the nodes of `make clusters` take from Debian; the programs of Kubernetes are built from Go modules (e2e/clusters/tools).
clusters_packages=(containerd runc containernetworking-plugins iptables busybox-static)
case $profile in
    demo) packages=("${demo_packages[@]}") ;;
    test) packages=("${demo_packages[@]}" "${test_packages[@]}") ;;
    bench) packages=("${demo_packages[@]}" "${test_packages[@]}" "${bench_packages[@]}") ;;
    clusters) packages=("${demo_packages[@]}" "${clusters_packages[@]}") ;;
    *) die "unknown subset '$profile' (known: demo, test, bench, clusters)" ;;
esac

[ -r /etc/os-release ] || die "this is not Debian: /etc/os-release is missing"
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ -n "$codename" ] || die "/etc/os-release names no VERSION_CODENAME"
[ "$(dpkg --print-architecture)" = amd64 ] || die "only amd64 is supported: the test guest is an x86-64 machine"

export DEBIAN_FRONTEND=noninteractive
apt_get() { apt-get -o DPkg::Lock::Timeout=$APT_LOCK_SECONDS -o Acquire::Retries=3 "$@"; }

updated=
update_lists() { # at most once a run; the lists' own lock knows no timeout, so wait for it here
    [ -z "$updated" ] || return 0
    say "refreshing the package lists"
    local deadline=$((SECONDS + APT_LOCK_SECONDS)) log
    log=$(mktemp)
    until apt_get update -qq >"$log" 2>&1; do
        grep -q 'Could not get lock' "$log" && [ $SECONDS -lt $deadline ] || { cat "$log" >&2; rm -f "$log"; die "apt-get update failed"; }
        sleep 2
    done
    rm -f "$log"
    updated=yes
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
major_of() { sed -E 's/^[0-9]+://; s/[^0-9].*//' <<<"$1"; }
satisfied() { # installed, and new enough where that matters
    installed "$1" || return 1
    [ -n "${major_min[$1]:-}" ] || return 0
    [ "$(major_of "$(dpkg-query -W -f '${Version}' "$1")")" -ge "${major_min[$1]}" ]
}

require_root() { [ "$(id -u)" = 0 ] || die "needs root to install: ${missing[*]} (run it with sudo)"; }

# --- packages -----------------------------------------------------------------------------------------------------------
missing=()
for package in "${packages[@]}"; do
    satisfied "$package" || missing+=("$package")
done

available() { # are the missing packages new enough in the given target release ("" for the default one)?
    local package version
    for package in "${missing[@]}"; do
        [ -n "${major_min[$package]:-}" ] || continue
        version=$(apt-cache ${1:+-t "$1"} policy "$package" 2>/dev/null | sed -n 's/^  Candidate: //p')
        [ -n "$version" ] && [ "$version" != "(none)" ] && [ "$(major_of "$version")" -ge "${major_min[$package]}" ] || return 1
    done
}

if [ ${#missing[@]} -gt 0 ]; then
    require_root
    update_lists
    release=
    if ! available ""; then
        release=$codename-backports
        if ! available "$release"; then
            # The mirror is the one that already serves this release here; nothing else is assumed about the network.
            uri=$(apt-get indextargets --format '$(RELEASE)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages' |
                sed -n "s/^$codename|main|//p" | sed -n 1p)
            [ -n "$uri" ] || die "no apt source for '$codename main' found to derive the backports mirror from"
            say "adding $release from this machine's own mirror"
            keyring=/usr/share/keyrings/debian-archive-keyring.gpg
            {
                printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$release"
                [ ! -e $keyring ] || printf 'Signed-By: %s\n' $keyring
            } >/etc/apt/sources.list.d/watari-backports.sources
            updated=
            update_lists
        fi
        available "$release" || die "neither $codename nor $release has new enough packages among: ${missing[*]}"
    fi
    say "installing: ${missing[*]}${release:+ (from $release where that is newer)}"
    # No service of these packages may start by itself: the tests run their own copies in their own namespaces.
    policy=/usr/sbin/policy-rc.d
    ours=
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
        ours=yes
    fi
    cleanup_policy() { [ -z "$ours" ] || rm -f $policy; }
    trap cleanup_policy EXIT
    apt_get install -y -qq --no-install-recommends ${release:+-t "$release"} "${missing[@]}" >/dev/null
    cleanup_policy
    ours=
else
    say "packages: nothing to install"
fi

# --- the guest's kernel ---------------------------------------------------------------------------------------------------
if [ -s "$cache/kernel/vmlinuz" ] && [ -s "$cache/kernel/modules.dep" ]; then
    say "guest kernel: $(cat "$cache/kernel/version"), already in $cache/kernel"
else
    # The meta package names the current kernel; an image package that is already installed would do as well, but the
    # tests must not depend on what the machine itself boots.
    image=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^  Depends: \(linux-image-.*\)$/\1/p' | sed -n 1p)
    if [ -z "$image" ]; then
        update_lists
        image=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^  Depends: \(linux-image-.*\)$/\1/p' | sed -n 1p)
    fi
    [ -n "$image" ] || die "linux-image-cloud-amd64 is in no apt source"
    say "guest kernel: downloading $image"
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/kernel.XXXXXX")
    chmod 755 "$work" # apt's download user must be able to enter it
    fetch() { (cd "$work" && apt_get download -qq -o APT::Sandbox::User=root "$image" >/dev/null 2>&1); }
    fetch || { update_lists; fetch; } || { rm -rf "$work"; die "cannot download $image"; }
    dpkg-deb -x "$work"/*.deb "$work/root"
    version=$(basename "$work"/root/boot/vmlinuz-* | sed 's/^vmlinuz-//')
    modules=lib/modules # Debian 13 and newer ship /usr/lib only
    [ -d "$work/root/$modules" ] || modules=usr/lib/modules
    mkdir -p "$work/kernel/lib"
    mv "$work/root/boot/vmlinuz-$version" "$work/kernel/vmlinuz"
    mv "$work/root/$modules" "$work/kernel/lib/modules"
    depmod=$(PATH=$PATH:/usr/sbin:/sbin command -v depmod) || die "depmod (package kmod) is missing"
    "$depmod" -b "$work/kernel" "$version"
    cp "$work/kernel/lib/modules/$version/modules.dep" "$work/kernel/modules.dep"
    echo "$version" >"$work/kernel/version"
    rm -rf "$cache/kernel"
    mv "$work/kernel" "$cache/kernel"
    rm -rf "$work"
    say "guest kernel: $version, unpacked in $cache/kernel"
fi

# --- the rest -------------------------------------------------------------------------------------------------------------
# Not an error: under sudo the caller's cargo is often out of sight.
command -v cargo >/dev/null || say "note: no cargo in PATH; the build needs Rust from rustup (Debian's own is too old for this workspace)"
[ -c /dev/net/tun ] || say "warning: /dev/net/tun is missing; the WAN emulator needs it (modprobe tun)"
say "ready: $(qemu-system-x86_64 --version | head -n 1)"
