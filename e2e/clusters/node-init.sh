#!/bin/bash
# Process 1 of a node. src/node.rs starts it in fresh mount, process, host name, IPC and control group namespaces, inside the node's
# network namespace and control groups; the environment says which node it is. It gives the node its own view of the machine, writes
# the programs' configuration and keeps the programs running; it ends only by being killed, and everything on the node with it.
#
# Invariants: nothing is written outside NODE_DIR, LOGS and VOLUMES (the rest of the file system lies under a private overlay or a
# tmpfs), and no mount made here is seen outside.
set -euo pipefail
: "${NODE:?}" "${ROLE:?}" "${NODE_DIR:?}" "${LOGS:?}" "${VOLUMES:?}" "${PROGRAMS:?}" "${CNI_PLUGINS:?}"
: "${ADDRESS:?}" "${POD_NET:?}" "${POD_RANGE:?}" "${SERVICE_RANGE:?}" "${DNS:?}" "${VOLUMES_IN_NODE:?}" "${PAUSE_IMAGE:?}"
readonly MTU=1500
readonly LOOP_DEVICES=128 # numbers that a Block claim may get on a machine; two per claim in use

# --- the node's own view ----------------------------------------------------------------------------------------------------
# Our id outside, first in NSpid, read by the shell itself while /proc is still the outer one.
while read -r key outer _; do if [ "$key" = NSpid: ]; then outside=$outer; fi; done </proc/self/status
mount --make-rprivate /
hostname "$NODE"

# Our folders first, at places that nothing below covers.
mount -t tmpfs -o mode=755,nosuid,nodev run /run
mkdir -p /run/lock /run/containerd /run/node/{own,logs,volumes,programs}
mount --bind "$NODE_DIR" /run/node/own
mount --bind "$LOGS" /run/node/logs
mount --bind "$VOLUMES" /run/node/volumes
mount --bind "$PROGRAMS" /run/node/programs
cd /run/node/own

# /etc and /var as the machine has them, changes kept for ourselves.
for folder in etc var; do
    mkdir -p overlay/$folder overlay/$folder.work
    mount -t overlay -o "lowerdir=/$folder,upperdir=$PWD/overlay/$folder,workdir=$PWD/overlay/$folder.work" overlay /$folder
done
[ ! -L /var/run ] || [ "$(readlink -f /var/run)" = /run ] || ln -sfn ../run /var/run
own() { mkdir -p "$1" "$2"; mount --bind "$1" "$2"; } # a folder of ours at the place where a program looks for it
own kubernetes /etc/kubernetes
own cni-conf /etc/cni/net.d
for name in kubelet containerd etcd cni kubevirt kubevirt-node-labeller; do own $name /var/lib/$name; done
for name in pods containers; do own $name-log /var/log/$name; done
own /run/node/volumes "$VOLUMES_IN_NODE"

mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
for controller in cpu cpuacct cpuset memory devices freezer blkio pids; do
    mkdir /sys/fs/cgroup/$controller
    mount -t cgroup -o $controller cgroup /sys/fs/cgroup/$controller
done
mkdir /sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd

# A /dev without kvm: what virtualises here is TCG, whatever the machine could do.
mount -t tmpfs -o mode=755,nosuid dev /dev
mkdir /dev/pts /dev/shm /dev/mqueue /dev/net
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts /dev/pts
ln -s pts/ptmx /dev/ptmx
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
device() { mknod -m "$1" "/dev/$2" "$3" "$4" "$5"; }
device 666 null c 1 3; device 666 zero c 1 5; device 666 full c 1 7; device 666 random c 1 8; device 666 urandom c 1 9
device 666 tty c 5 0; device 600 console c 5 1; device 600 kmsg c 1 11
device 666 net/tun c 10 200; device 600 loop-control c 10 237
for ((number = 0; number < LOOP_DEVICES; number++)); do device 660 loop$number b 7 $number; done
ln -s /proc/self/fd /dev/fd; ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr

mount -t proc -o nosuid,nodev,noexec proc /proc
# Kubelet sets these for the whole machine, unless it finds them as it wants them.
mkdir /run/node/sysctl
for setting in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
    echo "${setting#*=}" >"/run/node/sysctl/$(basename "${setting%=*}")"
    mount --bind "/run/node/sysctl/$(basename "${setting%=*}")" "/proc/sys/${setting%=*}"
done
mount --make-rshared / # what kubelet mounts has to reach the containers
cd /

# --- configuration ------------------------------------------------------------------------------------------------------------
cat >/etc/cni/net.d/10-pods.conflist <<X
{ "cniVersion": "0.4.0", "name": "pods", "plugins": [
  { "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true, "mtu": $MTU,
    "ipam": { "type": "host-local", "ranges": [[{ "subnet": "$POD_NET" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
  { "type": "portmap", "capabilities": { "portMappings": true } } ] }
X
# restrict_oom_score_adj: without CAP_SYS_RESOURCE runc may not lower the score, and every sandbox would die of it.
# device_ownership_from_security_context: a Block claim belongs to the container's user, which KubeVirt's storage asks for too.
cat >/etc/kubernetes/containerd.toml <<X
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$PAUSE_IMAGE"
  device_ownership_from_security_context = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$CNI_PLUGINS"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
X
echo "nameserver $DNS" >/etc/kubernetes/resolv.conf
cat >/etc/kubernetes/kubelet.yaml <<X
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: { anonymous: { enabled: false }, webhook: { enabled: true }, x509: { clientCAFile: /etc/kubernetes/pki/ca.crt } }
authorization: { mode: Webhook }
tlsCertFile: /etc/kubernetes/pki/kubelet-server.crt
tlsPrivateKeyFile: /etc/kubernetes/pki/kubelet-server.key
resolvConf: /etc/kubernetes/resolv.conf
clusterDNS: [$DNS]
clusterDomain: cluster.local
failSwapOn: false
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: { "memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%" }
maxPods: 110
serializeImagePulls: false
X

# --- programs -------------------------------------------------------------------------------------------------------------------
readonly RESTART_SECONDS=2
run() { # name, command…: started again whenever it ends
    local name=$1
    shift
    (
        while :; do
            echo "--- start $(date +%T)"
            "$@" || echo "--- ended with $?"
            sleep $RESTART_SECONDS
        done
    ) >>"/run/node/logs/$name.log" 2>&1 &
}
bin=/run/node/programs
kube=/etc/kubernetes
pki=$kube/pki

# Whoever waits for us may enter now.
echo "$outside" >/run/node/own/pid1.new
mv /run/node/own/pid1.new /run/node/own/pid1

if [ "$ROLE" = control-plane ]; then
    # The machine's disk is everybody's: no fsync per request. What a power cut would do to etcd is not what is tested here.
    run etcd $bin/etcd --data-dir /var/lib/etcd --unsafe-no-fsync --log-level warn \
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
        --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster default=http://127.0.0.1:2380
    run kube-apiserver $bin/kube-apiserver --etcd-servers=http://127.0.0.1:2379 --advertise-address="$ADDRESS" --secure-port=6443 \
        --allow-privileged=true --service-cluster-ip-range="$SERVICE_RANGE" --authorization-mode=Node,RBAC \
        --enable-admission-plugins=NodeRestriction --enable-aggregator-routing=true --endpoint-reconciler-type=lease \
        --client-ca-file=$pki/ca.crt --tls-cert-file=$pki/apiserver.crt --tls-private-key-file=$pki/apiserver.key \
        --kubelet-client-certificate=$pki/kubelet-client.crt --kubelet-client-key=$pki/kubelet-client.key \
        --kubelet-certificate-authority=$pki/ca.crt --kubelet-preferred-address-types=InternalIP \
        --requestheader-client-ca-file=$pki/front-proxy-ca.crt --requestheader-allowed-names=front-proxy-client \
        --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group --requestheader-username-headers=X-Remote-User \
        --proxy-client-cert-file=$pki/front-proxy-client.crt --proxy-client-key-file=$pki/front-proxy-client.key \
        --service-account-issuer="https://$NODE.internal" --service-account-key-file=$pki/sa.pub --service-account-signing-key-file=$pki/sa.key --v=1
    run kube-controller-manager $bin/kube-controller-manager --kubeconfig=$kube/controller-manager.conf \
        --authentication-kubeconfig=$kube/controller-manager.conf --authorization-kubeconfig=$kube/controller-manager.conf \
        --root-ca-file=$pki/ca.crt --service-account-private-key-file=$pki/sa.key --use-service-account-credentials=true \
        --cluster-signing-cert-file=$pki/ca.crt --cluster-signing-key-file=$pki/ca.key --leader-elect=false --bind-address=127.0.0.1 --v=1
    run kube-scheduler $bin/kube-scheduler --kubeconfig=$kube/scheduler.conf --leader-elect=false --bind-address=127.0.0.1 --v=1
fi
run containerd containerd --config $kube/containerd.toml
run kubelet $bin/kubelet --config=$kube/kubelet.yaml --kubeconfig=$kube/kubelet.conf --hostname-override="$NODE" --node-ip="$ADDRESS" --v=2
run kube-proxy $bin/kube-proxy --kubeconfig=$kube/kube-proxy.conf --proxy-mode=iptables --hostname-override="$NODE" \
    --cluster-cidr="$POD_RANGE" --conntrack-max-per-core=0 --v=1
# Process 1 reaps whatever is orphaned here.
while :; do wait -n || true; sleep 1; done
