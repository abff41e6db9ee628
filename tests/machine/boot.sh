#!/bin/bash
# PID 1 of the guest's namespaces: lay a throw-away overlay over the cached root, then become systemd.
# Usage (by guest.py, inside unshare): boot.sh ROOTFS REPOSITORY MOUNTPOINT
# Everything that is written lives in one tmpfs of this mount namespace, so it ends with the guest.
set -euo pipefail
rootfs=$1 repository=$2 scratch=$3 root=$3/root

mount -t tmpfs -o mode=755 scratch "$scratch"
mkdir "$scratch"/{upper,work,root,containers}
mount -t overlay -o "lowerdir=$rootfs,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$root"
# Podman's store must not lie on an overlay: an overlay cannot be the upper layer of another.
chown 1000:1000 "$scratch/containers"
mount --bind "$scratch/containers" "$root/home/echo/.local/share/containers"
mkdir -p "$scratch/system-containers" "$root/var/lib/containers"
mount --bind "$scratch/system-containers" "$root/var/lib/containers"
mount --bind -o ro "$repository" "$root/srv/echo-appliance"

mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
# As systemd does it where it is not in a container: closed to all but root.
mount -t bpf -o nosuid,nodev,noexec,mode=700 bpf "$root/sys/fs/bpf"
mount -t tmpfs -o mode=755,nosuid dev "$root/dev"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mkdir "$root"/dev/{net,pts,shm}
for device in null zero full random urandom tty fuse vsock; do
    [[ -e /dev/$device ]] || continue # fuse and vsock are not on every machine
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
# A node of the guest's own: udev would let users open it, without udev only root may.
[[ ! -e /dev/net/tun ]] || mknod -m 666 "$root/dev/net/tun" c 10 200
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for n in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${n%:*}" "$root/dev/${n#*:}"; done

ip link set lo up
hostname machine
mkdir "$root/run/old"
cd "$root"
pivot_root . run/old
umount -l /run/old
rmdir /run/old
mount --make-rshared /
# container= keeps systemd from touching clocks, consoles and other things of the machine.
exec env -i container=machine PATH=/usr/sbin:/usr/bin /usr/lib/systemd/systemd --show-status=no
