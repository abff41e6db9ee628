#!/bin/bash
# Build the machine tier's root: Debian trixie with systemd, rootless podman, pytest and a lingering
# user "echo" (uid 1000).  Usage: rootfs.sh DIRECTORY, as root.  The cache is keyed by this file's hash.
set -euo pipefail

packages=(
    systemd systemd-sysv dbus dbus-user-session libpam-systemd libnss-systemd iproute2 procps curl
    libbpf1 podman crun conmon uidmap catatonit fuse-overlayfs passt aardvark-dns nftables
    python3 python3-systemd python3-pytest python3-testinfra python3-podman
)

# Masked because they reach past the guest's namespaces (sysctl, modules, udev, kernel file systems),
# wait for what a guest without network never gets, or only cost time.
masked=(
    systemd-sysctl.service systemd-modules-load.service kmod-static-nodes.service systemd-udevd.service
    systemd-binfmt.service proc-sys-fs-binfmt_misc.automount proc-sys-fs-binfmt_misc.mount
    sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount dev-hugepages.mount
    dev-mqueue.mount sys-fs-fuse-connections.mount systemd-remount-fs.service
    systemd-networkd-wait-online.service systemd-resolved.service systemd-timesyncd.service
    systemd-firstboot.service systemd-machine-id-commit.service getty@.service console-getty.service
    podman.service podman.socket podman-restart.service podman-auto-update.service
    podman-auto-update.timer apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer
    e2scrub_all.timer fstrim.timer
)

# Settings that only this guest needs: a machine without CAP_SYS_RESOURCE cannot raise limits, which
# is what podman's default ulimits ask for.
containers_conf='[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
pids_limit = 0
[engine]
runtime = "crun"'

configure() {
    local root=$1 unit
    for unit in "${masked[@]}"; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
    : >"$root/etc/fstab"
    : >"$root/etc/resolv.conf"
    echo machine >"$root/etc/hostname"
    printf '127.0.0.1 localhost machine\n::1 localhost\n' >"$root/etc/hosts"
    echo 5b0e5b0e5b0e4b0e8b0e5b0e5b0e5b0e >"$root/etc/machine-id"
    chroot "$root" useradd --create-home --uid 1000 --shell /bin/bash echo
    echo echo:100000:65536 | tee "$root/etc/subuid" >"$root/etc/subgid"
    mkdir -p "$root/var/lib/systemd/linger" "$root/srv/echo-appliance"
    touch "$root/var/lib/systemd/linger/echo"
    chroot "$root" install -d -o echo -g echo /home/echo/.config{,/systemd,/systemd/user,/containers} \
        /home/echo/.config/containers/systemd /home/echo/.local{,/share,/share/containers}
    mkdir -p "$root/etc/containers"
    echo "$containers_conf" >"$root/etc/containers/containers.conf"
    printf '[storage]\ndriver = "overlay"\n' >"$root/home/echo/.config/containers/storage.conf"
    # What "pip install ." would leave: the command, and the package on the path.
    echo /srv/echo-appliance/app >"$root/usr/lib/python3/dist-packages/echo-appliance.pth"
    printf '#!/bin/sh\nexec /usr/bin/python3 -m echo_appliance "$@"\n' >"$root/usr/local/bin/echo-appliance"
    chmod 755 "$root/usr/local/bin/echo-appliance"
}

(
    IFS=,
    # No mirror is named: mmdebstrap then takes the suite's own default.
    mmdebstrap --quiet --mode=root --variant=minbase --include="${packages[*]}" \
        --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        trixie "$1"
)
configure "$1"
