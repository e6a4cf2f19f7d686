# The guest's work in tests.soak.state: `sh workers.sh HOST PORT`, in a directory that holds the sources, `blob` and
# `expected`. Each worker counts in count.NAME what it has done; what is wrong becomes a line of the file `wrong`.
host=$1 port=$2
wrong() { echo "$*" >>wrong; }
counted() { echo $2 >count.$1.new; mv count.$1.new count.$1; }

# Files with known content, read again past the page cache.
files() {
    n=0
    mkdir -p files
    while :; do
        n=$((n + 1)) f=files/$((n % 40)) g=files/$((n * 17 % 40))
        (echo $n; head -c $((n % 200 * 1000 + 1)) /dev/urandom) >$f.new
        sha256sum <$f.new >$f.sum.new
        mv $f.new $f; mv $f.sum.new $f.sum
        [ $((n % 7)) = 0 ] && { sync; echo 1 >/proc/sys/vm/drop_caches; }
        [ -e $g.sum ] && [ "$(sha256sum <$g)" != "$(cat $g.sum)" ] && wrong "$g does not have its checksum"
        counted files $n
        sleep 0.1
    done
}

# fio writes with direct and cached I/O by turns, and verifies.
verify() {
    n=0
    while :; do
        n=$((n + 1))
        fio --name=verify --filename=fio.dat --size=8M --rw=randwrite --bsrange=4k-64k --ioengine=libaio --iodepth=16 \
            --direct=$((n % 2)) --randseed=$n --verify=sha256 --do_verify=1 --verify_fatal=1 --invalidate=1 \
            >fio.log 2>&1 || { wrong "fio ends with status $?: $(tail -n 20 fio.log)"; return; }
        counted fio $n
        sleep 0.2
    done
}

# The same program compiled over and over: the same files each time, and it computes what the host's computes.
compile() {
    n=0
    mkdir -p first
    while :; do
        rm -rf build; mkdir build
        for source in code floating forks main signals threads traps vector; do
            n=$((n + 1))
            gcc -std=gnu11 -O2 -pthread -c -o build/$source.o src/$source.c 2>gcc.log \
                || { wrong "gcc ends with status $?: $(cat gcc.log)"; return; }
            [ -e first/$source.o ] || cp build/$source.o first/$source.o
            cmp -s build/$source.o first/$source.o || wrong "compile $n of $source made another file"
            counted compile $n
        done
        gcc -pthread -o build/work build/*.o -lm 2>gcc.log || { wrong "ld: $(cat gcc.log)"; return; }
        while read -r part seed rest; do
            build/work $part $seed >result.all 2>&1 || wrong "work $part $seed ends with status $?"
            grep -v @ result.all >result  # lines that name a vendor may differ between processors
            [ "$(sha256sum <result)" = "$rest" ] || wrong "work $part $seed: $(head -c 300 result)"
        done <expected
    done
}

gcc -std=gnu11 -O2 -Wall -Wextra -Werror -o peer peer.c || { wrong "peer.c does not compile"; exit 1; }
files & verify & compile &
{ ./peer serve 7001 blob >serve.log 2>&1; wrong "the server ends: $(cat serve.log)"; } &
{ sleep 1; ./peer client 127.0.0.1 7001 blob count.loopback >loopback.log 2>&1; wrong "$(cat loopback.log)"; } &
{ ./peer client $host $port blob count.tcp reset >tcp.log 2>&1; wrong "$(cat tcp.log)"; } &
wait
