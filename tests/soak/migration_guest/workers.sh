# The guest's work in tests.soak.migration: `bash workers.sh DISK`, in a directory that holds `src`, `expected`, `blob`
# and peer.c. Workers add a line to count.NAME for each thing done; what is wrong becomes a line of the file `wrong`.
cd "$(dirname "$0")" || exit 1
wrong() { echo "$*" >>wrong; }

# fio writes with direct and cached I/O by turns to a file system on a disk of its own, and verifies.
verify() {
    n=0
    while :; do
        n=$((n + 1))
        fio --name=verify --filename=/data/fio.dat --size=6M --rw=randwrite --bsrange=4k-64k --ioengine=libaio \
            --iodepth=16 --direct=$((n % 2)) --randseed=$n --verify=crc32c --do_verify=1 --verify_fatal=1 \
            --invalidate=1 --verify_state_save=0 >fio.log 2>&1 \
            || { wrong "fio ends with status $?: $(tail -n 20 fio.log)"; return; }
        echo $n >>count.fio
    done
}

# A tree of sources is compiled by two jobs, always to the same objects; the program prints what the host's prints.
compile() {
    while :; do
        make -s -C src clean
        make -s -C src -j2 COUNT="$PWD/count.compile" >make.log 2>&1 \
            || { wrong "make ends with status $?: $(tail -n 20 make.log)"; return; }
        sha256sum src/*.o >objects
        [ -e objects.first ] || cp objects objects.first
        cmp -s objects objects.first || wrong "other objects: $(diff objects objects.first)"
        src/program >result 2>&1 || wrong "the program ends with status $?"
        cmp -s result expected || wrong "the program prints $(head -c 300 result)"
        echo done >>count.builds
    done
}

disk=$(grep -lx "$1" /sys/block/vd*/serial | cut -d/ -f4)
mkdir -p /data
mkfs.ext4 -q "/dev/$disk" && mount "/dev/$disk" /data || { wrong "no file system on $1"; exit 1; }
gcc -std=gnu11 -O2 -Wall -Wextra -Werror -o peer peer.c || { wrong "peer.c does not compile"; exit 1; }
iperf3 -s -D
{ ./peer serve 7001 blob >serve.log 2>&1; wrong "the server ends: $(cat serve.log)"; } &
verify &
compile &
wait
