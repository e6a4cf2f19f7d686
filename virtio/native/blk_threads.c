/* Jobs of BlockEngine on a few native threads, which take several at a time and wake the loop once for them. */
#include "blk.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

int pool_open(struct pool *pool, struct disk *disk, unsigned threads)
{
    memset(pool, 0, sizeof *pool);
    pool->disk = disk;
    pool->threads = threads < 1 ? 1 : threads > THREADS_MAX ? THREADS_MAX : threads;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pool->event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return pool->event < 0 ? errno : 0;
}

/* How many of the waiting jobs a thread takes: a share, so that both work, and several, so that waking is cheap. */
static struct jobs take_share(struct pool *pool)
{
    struct jobs taken = {0};
    unsigned share = 1 + pool->queue.count / (2 * pool->threads);
    while (share--)
        jobs_add(&taken, jobs_take(&pool->queue));
    return taken;
}

static void *worker(void *argument)
{
    struct pool *pool = argument;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->queue.count && !pool->stopping)
            pthread_cond_wait(&pool->work, &pool->lock);
        if (pool->stopping)
            break;
        struct jobs jobs = take_share(pool);
        unsigned count = jobs.count;
        pool->running += count;
        pthread_mutex_unlock(&pool->lock);
        for (struct request *job = jobs.first; job; job = job->next)
            blk_run(pool->disk, job);
        pthread_mutex_lock(&pool->lock);
        bool first = !pool->done.count;
        jobs_join(&pool->done, &jobs);
        pool->running -= count;
        if (first)
            eventfd_write(pool->event, 1);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static bool start(struct pool *pool)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->started < pool->threads && !pthread_create(&pool->thread[pool->started], NULL, worker, pool))
        pool->started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool->started;
}

bool pool_submit(struct pool *pool, struct jobs *jobs, bool one)
{
    if (!start(pool))
        return false;
    unsigned count = jobs->count;
    pthread_mutex_lock(&pool->lock);
    jobs_join(&pool->queue, jobs);
    if (count > 1 && !one)
        pthread_cond_broadcast(&pool->work);
    else
        pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    return true;
}

struct jobs pool_done(struct pool *pool)
{
    struct jobs done = {0};
    if (!__atomic_exchange_n(&pool->poked, false, __ATOMIC_ACQUIRE) && !pool->started)
        return done;
    eventfd_t count;
    eventfd_read(pool->event, &count);
    pthread_mutex_lock(&pool->lock);
    jobs_join(&done, &pool->done);
    pthread_mutex_unlock(&pool->lock);
    return done;
}

void pool_poke(struct pool *pool)
{
    __atomic_store_n(&pool->poked, true, __ATOMIC_RELEASE);
    eventfd_write(pool->event, 1);
}

bool pool_cancel(struct pool *pool, struct jobs *dropped)
{
    pthread_mutex_lock(&pool->lock);
    jobs_join(dropped, &pool->queue);
    bool idle = !pool->running;
    jobs_join(dropped, &pool->done);
    pthread_mutex_unlock(&pool->lock);
    return idle;
}

void pool_close(struct pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    while (pool->started)
        pthread_join(pool->thread[--pool->started], NULL);
    if (pool->event >= 0)
        close(pool->event);
    pool->event = -1;
}
