/* What debuggers and tracers look at: a program of a few functions. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

volatile int counter;
int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
int step(int n)
{
    counter += n;
    return fibonacci(n % 12);
}
int main(void)
{
    int sum = 0;
    char *text = malloc(100);
    for (int i = 0; i < 40; i++) {
        sum += step(i);
        snprintf(text, 100, "%d", sum);
        sum += (int)strlen(text);
        char *more = realloc(text, 100 + (size_t)i);
        text = more;
    }
    free(text);
    printf("sum %d counter %d\n", sum, counter);
    fflush(stdout);
    return write(1, "end\n", 4) != 4;
}
