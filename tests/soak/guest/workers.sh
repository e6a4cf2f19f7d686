# `busybox sh workers.sh SEED WORKERS KIB ROUNDS`: as many workers at once, which run rounds until a line comes from the
# console, or ROUNDS each if that is not 0. The seeds of the first worker are SEED, SEED + WORKERS...
cd /soak
worker() {
    seed=$1 left=$4
    while [ ! -e stop ]; do
        ./busybox sh round.sh $seed $3 /tmp/soak.$seed
        seed=$((seed + $2)) left=$((left - 1))
        [ $left -eq 0 ] && break
    done
    echo "$1 worker ended"
}
i=0
while [ $i -lt $2 ]; do
    worker $(($1 + i)) $2 $3 $4 &
    i=$((i + 1))
done
read -r line
./busybox touch stop
wait
echo "workers ended"
