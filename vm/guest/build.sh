#!/bin/bash
# Build the VM's stand-in for CoreOS: Debian trixie with systemd, rootless podman, sshd, and Ignition as
# a first-boot stage of the initramfs.  Usage: build.sh DIRECTORY, as root, in a mount namespace of its
# own; leaves disk.ext4, vmlinux and initramfs.cpio there.  The cache is keyed by this folder's hash.
#
# What the appliance needs is not here: it comes by vm/echo.butane, as on CoreOS.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1 root=$1/root initramfs=$1/initramfs

packages=(
    systemd systemd-sysv dbus dbus-user-session libpam-systemd libnss-systemd udev kmod
    podman crun conmon uidmap catatonit passt netavark nftables
    openssh-server iproute2 procps ca-certificates python3-minimal libpython3-stdlib python3-systemd
    ignition busybox-static linux-image-cloud-amd64
)

# Masked since a throw-away guest gains nothing from them, and on an emulated processor they cost
# five of fifteen seconds.  The two sshd of the network are masked since there is none: systemd's
# generator adds one on vsock.
masked=(
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service
    fstrim.timer man-db.timer ldconfig.service nftables.service systemd-pstore.service
    systemd-firstboot.service systemd-hwdb-update.service systemd-journal-catalog-update.service
    systemd-update-done.service systemd-machine-id-commit.service systemd-remount-fs.service
    systemd-networkd.service systemd-networkd.socket systemd-network-generator.service
    systemd-timesyncd.service systemd-udev-load-credentials.service
    systemd-pcrextend.socket systemd-sysext.socket systemd-creds.socket systemd-binfmt.service
    proc-sys-fs-binfmt_misc.automount dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount
    sys-kernel-tracing.mount sys-kernel-config.mount sys-fs-fuse-connections.mount
    podman.socket podman-auto-update.timer podman-auto-update.service podman-restart.service podman-clean-transient.service
    netavark-dhcp-proxy.socket netavark-firewalld-reload.service ssh.service ssh.socket
    getty@tty1.service sshd-keygen.service systemd-random-seed.service modprobe@.service
    kmod-static-nodes.service systemd-tmpfiles-setup-dev-early.service systemd-sysusers.service
    systemd-journal-flush.service systemd-modules-load.service
)
# The same of the user's manager: agents of GnuPG and ssh.
masked_of_user=(
    dirmngr.socket gpg-agent.socket gpg-agent-browser.socket gpg-agent-extra.socket
    gpg-agent-ssh.socket keyboxd.socket ssh-agent.socket
)

# And programs that look for what this guest never has, each a process at every start of a manager.
masked_generators=(
    bless-boot cryptsetup debug fstab gpt-auto hibernate-resume integritysetup rc-local run
    system-update sysv tpm2 veritysetup
)

install_debian() {
    local IFS=,
    # No mirror is named: mmdebstrap then takes the suite's own default.
    mmdebstrap --quiet --mode=root --variant=minbase --include="${packages[*]}" \
        --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        trixie "$root"
}

configure() {
    local unit
    for unit in "${masked[@]}"; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
    for unit in "${masked_of_user[@]}"; do ln -sf /dev/null "$root/etc/systemd/user/$unit"; done
    mkdir -p "$root"/etc/systemd/{system,user}-generators
    for unit in "${masked_generators[@]}"; do
        ln -s /dev/null "$root/etc/systemd/system-generators/systemd-$unit-generator"
    done
    ln -s /dev/null "$root/etc/systemd/user-generators/systemd-xdg-autostart-generator"
    # No host name and no machine id, as on any image: Ignition brings the one, and without the other
    # systemd sees a first boot and applies the presets that Ignition wrote.
    rm -f "$root/etc/hostname" "$root/etc/machine-id" "$root/var/lib/dbus/machine-id"
    : >"$root/etc/fstab"
    ln -sf /usr/lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
    # Debian's Ignition was built to relabel what it writes, and reads this to learn the policy's name.
    mkdir -p "$root/etc/selinux"
    printf 'SELINUX=disabled\nSELINUXTYPE=none\n' >"$root/etc/selinux/config"
    # CID 1, the guest itself, along with the transport to the host, which systemd loads when it starts.
    echo 'softdep vmw_vsock_virtio_transport post: vsock_loopback' >"$root/etc/modprobe.d/vsock.conf"
    # Debian's Ignition leaves keys where CoreOS's sshd looks for them.
    printf '%s\n' 'AuthorizedKeysCommand /usr/bin/cat %h/.ssh/authorized_keys.d/ignition' \
        'AuthorizedKeysCommandUser root' >"$root/etc/ssh/sshd_config.d/ignition.conf"
    rm -f "$root"/etc/ssh/ssh_host_{rsa,ecdsa}_key*
    # Ask for no more devices than somebody waits for: the serial console, and who may open /dev/vsock.
    mkdir -p "$root/etc/systemd/system/systemd-udev-trigger.service.d"
    printf '%s\n' '[Service]' ExecStart= \
        'ExecStart=udevadm trigger --action=add --subsystem-match=tty --subsystem-match=misc' \
        >"$root/etc/systemd/system/systemd-udev-trigger.service.d/few.conf"
    mkdir -p "$root/etc/systemd/journald.conf.d"
    printf '[Journal]\nStorage=volatile\n' >"$root/etc/systemd/journald.conf.d/vm.conf"
}

make_initramfs() {
    local kernel=$1 program library
    mkdir -p "$initramfs"/{bin,dev,etc,proc,run,sys,sysroot,tmp,usr/sbin,usr/bin,usr/lib64,"usr/lib/modules/$kernel"}
    ln -s usr/lib "$initramfs/lib"
    ln -s usr/lib64 "$initramfs/lib64"
    cp "$root/usr/bin/busybox" "$initramfs/bin/"
    for program in sh mount umount grep tail sleep switch_root modprobe poweroff; do
        ln -s busybox "$initramfs/bin/$program"
    done
    cp "$root/usr/lib/dracut/modules.d/30ignition/ignition" "$initramfs/usr/bin/"
    cp "$root"/usr/sbin/{useradd,usermod,groupadd} "$initramfs/usr/sbin/"
    # What Ignition would relabel with; SELinux is off.
    printf '#!/bin/sh\ncat >/dev/null\n' >"$initramfs/usr/sbin/setfiles"
    chmod 755 "$initramfs/usr/sbin/setfiles"
    for program in usr/lib/dracut/modules.d/30ignition/ignition usr/sbin/{useradd,usermod,groupadd}; do
        chroot "$root" ldd "/$program"
    done | grep -o '/[^ ]*' | sort -u | while read -r library; do
        mkdir -p "$initramfs$(dirname "$library")"
        cp -L "$root$library" "$initramfs$library"
    done
    # The module that Ignition loads to get its config.
    xz -dc "$root/usr/lib/modules/$kernel/kernel/drivers/firmware/qemu_fw_cfg.ko.xz" \
        >"$initramfs/usr/lib/modules/$kernel/qemu_fw_cfg.ko"
    echo qemu_fw_cfg.ko: >"$initramfs/usr/lib/modules/$kernel/modules.dep"
    touch "$initramfs/etc/initrd-release"
    install -m 755 "$here/init" "$initramfs/init"
    # Not compressed: unpacking costs an emulated processor more than reading.
    (cd "$initramfs" && find . | "$root/usr/bin/busybox" cpio -o -H newc 2>/dev/null) >"$folder/initramfs.cpio"
}

# Print a bzImage's payload, the ELF kernel: QEMU starts that without the real mode and the unpacking,
# 2.5 s of an emulated processor.  Offsets: Documentation/arch/x86/boot.rst.
vmlinux() {
    local setup offset length
    setup=$(od -An -tu1 -j 497 -N 1 "$1")
    read -r offset length < <(od -An -tu4 -j 584 -N 8 "$1")
    dd if="$1" iflag=skip_bytes,count_bytes bs=1M status=none \
        skip="$(((setup + 1) * 512 + offset))" count="$((length - 4))" | zstd -dcq
}

install_debian
kernel=$(ls "$root/usr/lib/modules")
configure
make_initramfs "$kernel"
vmlinux "$root/boot/vmlinuz-$kernel" >"$folder/vmlinux"
rm -rf "${root:?}"/boot/* "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
truncate -s 3G "$folder/disk.ext4"
mke2fs -q -t ext4 -O ^has_journal -m 0 -L root -d "$root" "$folder/disk.ext4"
rm -rf "$root" "$initramfs"
