// Write 32-bit values to ports: outl PORT VALUE [PORT VALUE...], in any base that C knows.
#include <stdio.h>
#include <stdlib.h>
#include <sys/io.h>

int main(int count, char **words)
{
    if (iopl(3)) {
        perror("iopl");
        return 1;
    }
    for (int at = 1; at + 1 < count; at += 2)
        outl((unsigned)strtoul(words[at + 1], NULL, 0), (unsigned short)strtoul(words[at], NULL, 0));
    return 0;
}
