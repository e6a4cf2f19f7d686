/* Requests of FsEngine on a few native threads. */
#define _GNU_SOURCE
#include "fs.h"
#include "clock.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { LINGER_MAX_NS = 100000, LINGER_MIN_NS = 10000 };

/* Whether a request can be answered while the loop looks on. */
static bool several_processors(void)
{
    cpu_set_t allowed;
    return !sched_getaffinity(0, sizeof allowed, &allowed) && CPU_COUNT(&allowed) > 1;
}

int fs_pool_open(struct fs_pool *pool, struct fs *fs)
{
    memset(pool, 0, sizeof *pool);
    pool->fs = fs;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->urgent_work, NULL);
    pool->linger_ns = several_processors() ? LINGER_MAX_NS : 0;
    pool->event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return pool->event < 0 ? errno : 0;
}

static void *serve(struct fs_pool *pool, struct fs_list *queue, pthread_cond_t *work, unsigned *idle)
{
    /* A umask of its own: the guest's kernel has applied its program's already. */
    if (!unshare(CLONE_FS))
        umask(0);
    else
        __atomic_store_n(&pool->fs->fix_modes, true, __ATOMIC_RELAXED);
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!queue->count && !pool->stopping) {
            (*idle)++;
            pthread_cond_wait(work, &pool->lock);
            (*idle)--;
        }
        if (pool->stopping)
            break;
        struct fs_request *request = fs_list_take(queue);
        if (!request->ring) {
            pthread_mutex_unlock(&pool->lock);
            close(request->closes);
            free(request);
            pthread_mutex_lock(&pool->lock);
            continue;
        }
        pool->running++;
        pthread_mutex_unlock(&pool->lock);
        fs_run(pool->fs, request);
        pthread_mutex_lock(&pool->lock);
        bool first = !pool->done.count && !pool->watched;
        fs_list_add(&pool->done, request);
        pool->running--;
        if (first) { /* without the lock, which who wakes by it wants at once */
            pthread_mutex_unlock(&pool->lock);
            eventfd_write(pool->event, 1);
            pthread_mutex_lock(&pool->lock);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void *worker(void *argument)
{
    struct fs_pool *pool = argument;
    return serve(pool, &pool->queue, &pool->work, &pool->idle);
}

static void *urgent_worker(void *argument)
{
    struct fs_pool *pool = argument;
    unsigned idle = 0;
    return serve(pool, &pool->urgent, &pool->urgent_work, &idle);
}

/* How many threads there are now. */
static unsigned start(struct fs_pool *pool)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->started < 1 + FS_THREADS &&
           !pthread_create(&pool->thread[pool->started], NULL, pool->started ? worker : urgent_worker, pool))
        pool->started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool->started;
}

bool fs_pool_submit(struct fs_pool *pool, struct fs_list *requests, bool urgent)
{
    if (!requests->count)
        return true;
    if (start(pool) < (urgent ? 1 : 2))
        return false;
    pool->submitted_ns = clock_now();
    pthread_mutex_lock(&pool->lock);
    unsigned wake = requests->count < pool->idle ? requests->count : pool->idle;
    for (struct fs_request *request; (request = fs_list_take(requests));)
        fs_list_add(urgent ? &pool->urgent : &pool->queue, request);
    pthread_mutex_unlock(&pool->lock);
    if (urgent)
        pthread_cond_signal(&pool->urgent_work);
    else
        while (wake--)
            pthread_cond_signal(&pool->work);
    return true;
}

bool fs_pool_ready(struct fs_pool *pool)
{
    return start(pool) >= 2;
}

void fs_pool_hand_over(struct fs_pool *pool, struct fs_request *request, bool urgent)
{
    pthread_mutex_lock(&pool->lock);
    fs_list_add(urgent ? &pool->urgent : &pool->queue, request);
    pthread_mutex_unlock(&pool->lock);
    pthread_cond_signal(urgent ? &pool->urgent_work : &pool->work);
}

void fs_pool_answered(struct fs_pool *pool, struct fs_request *request)
{
    pthread_mutex_lock(&pool->lock);
    fs_list_add(&pool->done, request);
    pthread_mutex_unlock(&pool->lock);
    fs_pool_wake_loop(pool);
}

void fs_pool_wake_loop(struct fs_pool *pool)
{
    eventfd_write(pool->event, 1);
}

struct fs_list fs_pool_linger(struct fs_pool *pool)
{
    if (pool->linger_ns < LINGER_MIN_NS)
        return (struct fs_list){0};
    pthread_mutex_lock(&pool->lock);
    pool->watched = true;
    pthread_mutex_unlock(&pool->lock);
    int64_t end = pool->submitted_ns + pool->linger_ns;
    bool done = false;
    while (!(done = __atomic_load_n(&pool->done.count, __ATOMIC_RELAXED)) && clock_now() < end)
        __builtin_ia32_pause();
    pthread_mutex_lock(&pool->lock);
    pool->watched = false;
    struct fs_list taken = pool->done;
    pool->done = (struct fs_list){0};
    pthread_mutex_unlock(&pool->lock);
    if (!done)
        pool->linger_ns /= 2;
    return taken;
}

void fs_pool_put_back(struct fs_pool *pool, struct fs_list *requests)
{
    if (!requests->count)
        return;
    pthread_mutex_lock(&pool->lock);
    for (struct fs_request *request; (request = fs_list_take(requests));)
        fs_list_add(&pool->done, request);
    pthread_mutex_unlock(&pool->lock);
    eventfd_write(pool->event, 1);
}

struct fs_list fs_pool_done(struct fs_pool *pool)
{
    eventfd_t count;
    eventfd_read(pool->event, &count);
    /* It pays to linger as long as answers would come in that time. */
    if (pool->linger_ns && pool->linger_ns < LINGER_MAX_NS && clock_now() - pool->submitted_ns < LINGER_MAX_NS)
        pool->linger_ns = LINGER_MAX_NS;
    pthread_mutex_lock(&pool->lock);
    struct fs_list done = pool->done;
    pool->done = (struct fs_list){0};
    pthread_mutex_unlock(&pool->lock);
    return done;
}

bool fs_pool_cancel(struct fs_pool *pool, struct fs_list *dropped)
{
    pthread_mutex_lock(&pool->lock);
    for (struct fs_request *request; (request = fs_list_take(&pool->queue));)
        fs_list_add(dropped, request);
    for (struct fs_request *request; (request = fs_list_take(&pool->urgent));)
        fs_list_add(dropped, request);
    for (struct fs_request *request; (request = fs_list_take(&pool->done));)
        fs_list_add(dropped, request);
    bool idle = !pool->running;
    pthread_mutex_unlock(&pool->lock);
    return idle;
}

void fs_pool_close(struct fs_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work);
    pthread_cond_broadcast(&pool->urgent_work);
    pthread_mutex_unlock(&pool->lock);
    while (pool->started)
        pthread_join(pool->thread[--pool->started], NULL);
    if (pool->event >= 0)
        close(pool->event);
    pool->event = -1;
}
