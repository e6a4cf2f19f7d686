/* sendframes INTERFACE: sends each line of stdin, hexadecimal, as an Ethernet frame of its own. */
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    static char line[1 << 17];
    static unsigned char frame[1 << 16];
    if (argc != 2)
        return 2;
    int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(argv[1])};
    if (fd < 0 || !to.sll_ifindex) {
        perror(argv[1]);
        return 1;
    }
    while (fgets(line, sizeof line, stdin)) {
        size_t length = strspn(line, "0123456789abcdef") / 2;
        for (size_t i = 0; i < length; i++)
            if (sscanf(line + 2 * i, "%2hhx", &frame[i]) != 1)
                return 1;
        if (length && sendto(fd, frame, length, 0, (struct sockaddr *)&to, sizeof to) < 0) {
            perror("sendto");
            return 1;
        }
    }
    return 0;
}
