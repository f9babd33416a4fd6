#!/bin/sh
# The first process of a node: its own mounts, cgroup view and bpffs, then its services. Given in the environment:
# NODE (its name), FOLDER (what it keeps), CGROUPS (version 1 hierarchies, folder:options), UNIFIED (where cgroup2 is).
set -eu
hostname "$NODE"
mount --make-rprivate /

# Nothing is left on the machine: what a node writes lies in its folder.
for pair in lib:/var/lib log:/var/log opt:/opt; do
  mkdir -p "$FOLDER/${pair%%:*}"
  mount --bind "$FOLDER/${pair%%:*}" "${pair#*:}"
done
# In memory, as systemd has it, but for what the machine looks at.
mount -t tmpfs -o mode=755 run /run
for name in containerd nri node spire; do
  mkdir -p "$FOLDER/run/$name" "/run/$name"
  mount --bind "$FOLDER/run/$name" "/run/$name"
done
# Its /etc is the machine's, with what the node itself writes there on top.
mkdir -p "$FOLDER/etc-upper" "$FOLDER/etc-work"
mount -t overlay -o "lowerdir=/etc,upperdir=$FOLDER/etc-upper,workdir=$FOLDER/etc-work" overlay /etc
mkdir -p /run/netns /etc/cni/net.d /opt/cni/bin /opt/volume-plugins
cp "$FOLDER/etc/cni.conflist" /etc/cni/net.d/10-pods.conflist

# The kubelet sets some of the kernel's own settings, which belong to the machine: here it sets copies.
for name in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys \
  kernel/keys/root_maxbytes; do
  [ -f "/proc/sys/$name" ] || continue
  mkdir -p "$FOLDER/sysctl/${name%/*}"
  cat "/proc/sys/$name" > "$FOLDER/sysctl/$name"
  mount --bind "$FOLDER/sysctl/$name" "/proc/sys/$name"
done

umount -l /sys || true
mount -t sysfs sys /sys
mount -t bpf bpf /sys/fs/bpf
if [ -n "$CGROUPS" ]; then
  mount -t tmpfs -o mode=755 cgroups /sys/fs/cgroup
  for pair in $CGROUPS; do
    mkdir -p "/sys/fs/cgroup/${pair%%:*}"
    mount -t cgroup -o "${pair#*:}" cgroup "/sys/fs/cgroup/${pair%%:*}"
  done
  mkdir -p "$UNIFIED"
  mount -t cgroup2 cgroup2 "$UNIFIED"
else
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  # A group that hands controllers on holds no process itself. The process that made this one leaves by itself.
  mkdir -p /sys/fs/cgroup/init
  echo $$ > /sys/fs/cgroup/init/cgroup.procs
  for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    tries=0
    until echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control 2>/dev/null; do
      tries=$((tries + 1))
      [ $tries -lt 100 ] || break
      sleep 0.05
    done
  done
fi
mount --make-rshared /

"$FOLDER/etc/start-containerd" &
until ctr -a /run/containerd/containerd.sock version > /dev/null 2>&1; do sleep 0.1; done
"$FOLDER/etc/start-kubelet" &
"$FOLDER/etc/start-kube-proxy" &
echo started > /run/node/started
# Orphans of the whole node are buried here, for as long as it stands.
while :; do wait || true; sleep 1; done
