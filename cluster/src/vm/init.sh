#!/bin/busybox sh
# The first process of a virtual machine for tests: mounts as systemd makes them on a machine with cgroup2 alone, the
# modules, then every program of /runs/all.
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/bin HOME=/root RUST_BACKTRACE=0
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount --make-rshared /
ip link set lo up
for module in /modules/*; do
  case $module in
    *.xz) unxz -c "$module" > /tmp/module.ko && insmod /tmp/module.ko && rm /tmp/module.ko ;;
    *) insmod "$module" ;;
  esac || echo "weft-vm: $module cannot be loaded"
done
echo "weft-vm: Linux $(uname -r)"
. /runs/all
poweroff -f
