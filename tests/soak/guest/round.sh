# One round of the soak: `busybox sh round.sh SEED KIB DIRECTORY` prints lines "SEED check digest", the same on
# every machine. `work` and `busybox` stand in the current directory; files go to DIRECTORY, which is made and removed.
seed=$1 size=$(($2 * 1024)) home=$PWD dir=$3
b=$home/busybox work=$home/work
export GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX,-AVX512F LC_ALL=C TZ=UTC
$b mkdir $dir && cd $dir || exit 1
digest() { $b sha256sum | $b cut -c 1-16; }
told() { echo "$seed $1 $($b cat | digest)"; }

for part in forks signals traps threads floating vector code; do
    $work $part $seed >out 2>&1 || echo "FAILED with status $?" >>out
    $b sed "s/^/$seed /" out
done

$work data $seed $size >text
told text <text
$b gzip -9 -n <text >text.gz 2>err || echo "$seed gzip FAILED"
told gzip <text.gz
$b gunzip <text.gz | told gunzip
$b gzip -1 -n <text | $b gunzip | $b cmp - text || echo "$seed gunzip FAILED"
$b bzip2 <text | told bzip2
$b sort text | told sort
$b sort -n -r text | told sort-numeric
$b cut -d ' ' -f 1 text | $b sort | $b uniq -c | told uniq
$b md5sum <text | told md5sum
$b sha1sum <text | told sha1sum
$b sha512sum <text | told sha512sum
$b sha3sum <text | told sha3sum
$b head -c 65536 text | $b xxd | told xxd
$b awk '{ n += length($0) * 1.000001; s[$1] += NR / 7 } END { for (w in s) printf "%s %.15g\n", w, s[w]; print n }' \
    text 2>&1 | $b sort | told awk
echo "scale=60; a(1)*4; e(l(2)*$((seed % 10000))/1000); sqrt($seed)" | $b bc -l | told bc

# Many small processes: pipelines, subshells, background jobs, statuses.
i=0
while [ $i -lt 12 ]; do
    i=$((i + 1))
    (echo $((seed * i)); exit $i) | $b cat | $b tr 0-9 a-j | $b rev
    (exit $i) & wait $!
    echo $?
done | told pipes
i=0
while [ $i -lt 6 ]; do
    i=$((i + 1))
    $work leaf $((seed + i)) >leaf.$i &
done
wait
$b cat leaf.1 leaf.2 leaf.3 leaf.4 leaf.5 leaf.6 | told jobs
$b mkdir tree && $b tar -cf - -C .. ${dir##*/}/leaf.1 ${dir##*/}/leaf.2 | $b tar -xf - -C tree
$b find tree -type f | $b sort | $b xargs $b cat | told tar
$b timeout 30 $b sh -c 'trap "echo caught; exit 5" TERM; kill -TERM $$; echo missed' | told trap
cd $home && $b rm -r $dir && echo "$seed end"
