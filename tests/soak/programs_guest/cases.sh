# `sh cases.sh NAME`, in an empty directory: one case of tests/soak/programs.py. W is the directory with what was built. What is printed is the same
# on every machine. The second line of each names the program that it needs.
case $1 in
java)
    : java
    java -XX:-UsePerfData -cp $W Work
    ;;
java-interpreted)
    : java
    java -XX:-UsePerfData -Xint -cp $W Work
    ;;
java-compiled)
    : java
    java -XX:-UsePerfData -XX:-TieredCompilation -Xcomp -XX:CompileOnly=Work -cp $W Work
    ;;
javac)
    : javac
    javac -d . $W/Work.java && sha256sum *.class
    ;;
node)
    : node
    node $W/work.js
    ;;
node-compiled)
    : node
    node --always-turbofan $W/work.js
    ;;
luajit)
    : luajit
    luajit $W/work.lua 2>&1
    ;;
perl)
    : perl
    perl -e 'my %h; for (1..80000) { $h{$_ % 1000} .= chr(65 + $_ % 26) } my $n = 0;
        for (sort keys %h) { $n += length $h{$_}; $n++ while $h{$_} =~ /ABC/g } print "$n\n"; eval { die "x\n" }; print $@;
        local $SIG{ALRM} = sub { print "alarm\n" }; alarm 1; select undef, undef, undef, 3;'
    ;;
sqlite)
    : sqlite3
    sqlite3 t.db "pragma mmap_size=268435456; create table t(a integer primary key, b text);
        with recursive c(x) as (select 1 union all select x+1 from c where x<20000)
        insert into t select x, printf('%d', x*7919%10007) from c;
        create index i on t(b); select count(*), sum(a), max(b) from t where b like '%7%'; pragma integrity_check;"
    sha256sum t.db
    ;;
gcc)
    : gcc
    cp $W/project/* .
    for f in *.c; do gcc -O2 -c $f || exit; done
    gcc -o work *.o -lm -pthread
    sha256sum *.o work
    ./work data 3 20000 | sha256sum
    ;;
python)
    : python3
    python3 -m test -v test_json test_re test_struct test_zlib test_mmap test_float test_generators test_bytes test_array \
        test_signal test_threadsignals >out 2>&1
    status=$?
    grep -E '^(test_|Result|Tests result|FAIL|ERROR)' out | grep -v -i -e ' ms' -e 'sec' | sed 's/ in .*//' | sort | sha256sum
    grep -E '^(Result|Tests result|FAIL|ERROR)' out
    exit $status
    ;;
git)
    : git
    export GIT_COMMITTER_DATE=2020-01-01T00:00:00Z GIT_AUTHOR_DATE=2020-01-01T00:00:00Z
    git init -q . && git config user.email a@b && git config user.name a
    for i in 1 2 3 4 5; do seq 1 $((i * 500)) >f; git add f; git commit -qm $i; done
    git gc -q
    git fsck --full 2>&1
    git log --format=%H
    ;;
openssl)
    : openssl
    seq 1 200000 >t
    openssl dgst -sha512 t
    openssl enc -aes-128-ctr -K 00112233445566778899aabbccddeeff -iv 00 -in t 2>/dev/null | openssl md5
    openssl prime -hex 10000000000000000000000000000000000000000000000000CD
    ;;
xz)
    : xz
    seq 1 60000 | xz -6 | tee t.xz | sha256sum
    xz -dc t.xz | sha256sum
    ;;
valgrind)
    : valgrind
    valgrind -q --error-exitcode=9 $W/dynamic
    echo $?
    valgrind --tool=callgrind --callgrind-out-file=/dev/null $W/dynamic 2>&1 | grep -v ==
    ;;
gdb)
    : gdb
    gdb -nx -q -batch -ex 'set confirm off' -ex 'break fibonacci if n == 7' -ex run -ex bt -ex 'stepi 300' \
        -ex 'info registers rip rax eflags' -ex delete -ex 'watch counter if counter > 300' -ex continue -ex 'print counter' \
        -ex 'tbreak step' -ex continue -ex finish -ex 'x/5i $pc' -ex kill $W/small 2>&1 | grep -v -e process -e warning -e '^$'
    ;;
strace)
    : strace
    strace -e trace=write,brk -e signal=none -o t $W/small
    sed -E 's/0x[0-9a-f]+/X/g;s/ +/ /g' t
    ;;
ltrace)
    : ltrace
    ltrace -e realloc+snprintf+strlen -o t $W/dynamic
    grep -c realloc t
    grep snprintf t | sed 's/.*"%d"//' | sha256sum
    ;;
kernel64)
    : sh
    $W/kernel64
    ;;
kernel32)
    : sh
    $W/kernel32
    ;;
small32)
    : gdb
    $W/small32
    gdb -nx -q -batch -ex 'break fibonacci if n == 7' -ex run -ex bt -ex 'stepi 100' -ex 'info registers eip eax eflags' \
        -ex kill $W/small32 2>&1 | grep -v -e process -e warning -e '^$'
    ;;
shell)
    : sh
    i=0
    while [ $i -lt 60 ]; do
        (echo $i | tr 0-9 a-j | rev; exit $((i % 5)))
        echo $?
        i=$((i + 1))
    done | sha256sum
    ;;
esac
