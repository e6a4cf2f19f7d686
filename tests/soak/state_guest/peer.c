/* TCP transfers that check every byte, both ways. Both ends hold the same file, so each knows what the other must send.
 *
 * peer serve PORT FILE                            one connection after another
 * peer client HOST PORT FILE COUNT [reset]        transfers without end; COUNT gets "transfers resets timeouts"
 *
 * A transfer: the client sends offset and length, both 32 bits, little endian, then that part of the file; the server
 * compares, and sends the part back. With `reset` a connection may be lost, or its other end may have gone without a
 * word: half a second of silence ends it, and it is made anew. Otherwise that is a failure. Status 1 and a line for
 * wrong bytes and for failures.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

enum { LARGEST = 1 << 18, TRANSFERS = 8, TIMEOUT_SECONDS = 60, SILENCE_US = 500000, PAUSE_US = 150000 };

struct part {
    uint32_t offset, length;
};

static const uint8_t *file;
static uint32_t file_size;

static _Noreturn void fail(const char *what)
{
    printf("tcp: %s: %s\n", what, strerror(errno));
    exit(1);
}

static _Noreturn void wrong(const char *who, struct part part, uint32_t at)
{
    printf("tcp: wrong bytes at the %s: part %u+%u, byte %u\n", who, part.offset, part.length, at);
    exit(1);
}

/* 1: done; 0: the peer has ended the connection before the first byte; -1: errno says what happened. */
static int receive_all(int fd, void *buffer, uint32_t length)
{
    for (uint32_t done = 0; done < length;) {
        ssize_t n = recv(fd, (uint8_t *)buffer + done, length - done, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            if (n == 0 && done)
                errno = ECONNRESET;
            return n == 0 && !done ? 0 : -1;
        }
        done += (uint32_t)n;
    }
    return 1;
}

static int send_all(int fd, const void *buffer, uint32_t length)
{
    for (uint32_t done = 0; done < length;) {
        ssize_t n = send(fd, (const uint8_t *)buffer + done, length - done, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -1;
        done += (uint32_t)n;
    }
    return 1;
}

static void compare(const char *who, const uint8_t *got, struct part part)
{
    if (!memcmp(got, file + part.offset, part.length))
        return;
    uint32_t at = 0;
    while (got[at] == file[part.offset + at])
        at++;
    wrong(who, part, at);
}

static void serve(uint16_t port)
{
    static uint8_t buffer[LARGEST];
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8))
        fail("listen");
    for (;;) {
        struct part part;
        int fd = accept(listener, NULL, NULL), status;
        if (fd < 0)
            fail("accept");
        while ((status = receive_all(fd, &part, sizeof part)) > 0) {
            if (part.length > LARGEST || part.offset > file_size || part.length > file_size - part.offset)
                wrong("server, in a header", part, 0);
            if (receive_all(fd, buffer, part.length) <= 0)
                fail("server, receive");
            compare("server", buffer, part);
            if (send_all(fd, file + part.offset, part.length) < 0)
                fail("server, send");
        }
        if (status < 0)
            fail("server, header");
        close(fd);
    }
}

static int connection(const char *host, uint16_t port, int may_reset)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    struct timeval timeout = { .tv_sec = may_reset ? 0 : TIMEOUT_SECONDS, .tv_usec = may_reset ? SILENCE_US : 0 };
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
        fail(host);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0)
        fail("socket");
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

static void client(const char *host, uint16_t port, const char *count, int may_reset)
{
    static uint8_t buffer[LARGEST];
    char beside[256];
    uint64_t transfers = 0, resets = 0, timeouts = 0, random = 88172645463325252ULL;
    snprintf(beside, sizeof beside, "%s.new", count);
    for (;;) {
        int fd = connection(host, port, may_reset), status = fd < 0 ? -1 : 1;
        for (int i = 0; i < TRANSFERS && status > 0; i++) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            struct part part = { .length = (uint32_t)(random % LARGEST) + 1 };
            part.offset = (uint32_t)((random >> 32) % (file_size - part.length));
            status = send_all(fd, &part, sizeof part);
            if (status > 0)
                status = send_all(fd, file + part.offset, part.length);
            if (status > 0 && (status = receive_all(fd, buffer, part.length)) == 0)
                errno = ECONNRESET;
            if (status > 0) {
                compare("client", buffer, part);
                transfers++;
            }
            usleep(PAUSE_US);
        }
        if (status <= 0) {
            if (!may_reset)
                fail("client");
            if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ETIMEDOUT || errno == EINPROGRESS)
                timeouts++;
            else
                resets++;
            usleep(PAUSE_US);
        }
        if (fd >= 0)
            close(fd);
        FILE *out = fopen(beside, "w");
        if (!out)
            fail(beside);
        fprintf(out, "%llu %llu %llu\n", (unsigned long long)transfers, (unsigned long long)resets,
                (unsigned long long)timeouts);
        if (fclose(out) || rename(beside, count))
            fail(count);
    }
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    int serving = !strcmp(argv[1], "serve");
    if (!serving && argc < 6)
        return 2;
    int fd = open(argv[serving ? 3 : 4], O_RDONLY);
    struct stat status;
    if (fd < 0 || fstat(fd, &status))
        fail("file");
    file_size = (uint32_t)status.st_size;
    file = mmap(NULL, file_size, PROT_READ, MAP_SHARED, fd, 0);
    if (file == MAP_FAILED)
        fail("mmap");
    if (serving)
        serve((uint16_t)atoi(argv[2]));
    client(argv[2], (uint16_t)atoi(argv[3]), argv[5], argc > 6);
}
