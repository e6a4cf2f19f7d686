#!/soak/busybox sh
# The guest's init: a shell on the console, whose prompt tells the host that it listens.
b=/soak/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
$b mount -t tmpfs tmp /tmp
export PATH=/bin PS1='soak-shell# ' HOME=/
$b --install -s /bin
while :; do $b setsid $b cttyhack $b sh; done
