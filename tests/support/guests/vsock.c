/* vsock PORT: echo whoever connects. vsock CID PORT: connect, send standard input, print what comes back. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <unistd.h>

static void copy(int from, int to, int *open)
{
    char data[65536];
    ssize_t got = read(from, data, sizeof data);
    if (got <= 0) {
        *open = 0;
        return;
    }
    for (ssize_t at = 0, done; at < got; at += done)
        if ((done = write(to, data + at, (size_t)(got - at))) <= 0)
            exit(3);
}

int main(int argc, char **argv)
{
    int connection = socket(AF_VSOCK, SOCK_STREAM, 0);
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY};
    if (argc < 2 || connection < 0)
        return 2;
    address.svm_port = (unsigned)atoi(argv[argc - 1]);
    if (argc == 2) {
        if (bind(connection, (struct sockaddr *)&address, sizeof address) || listen(connection, 4))
            return 2;
        puts("listening");
        fflush(stdout);
        for (;;) {
            int peer = accept(connection, NULL, NULL), open = 1;
            while (open)
                copy(peer, peer, &open);
            close(peer);
        }
    }
    address.svm_cid = (unsigned)atoi(argv[1]);
    if (connect(connection, (struct sockaddr *)&address, sizeof address))
        return 1;
    struct pollfd wait[2] = {{.fd = 0, .events = POLLIN}, {.fd = connection, .events = POLLIN}};
    for (int input = 1, peer = 1; peer;) {
        poll(wait, 2, -1);
        if (wait[1].revents)
            copy(connection, 1, &peer);
        if (wait[0].revents) {
            copy(0, connection, &input);
            if (!input) {
                wait[0].fd = -1;
                shutdown(connection, SHUT_WR);
            }
        }
    }
    return 0;
}
