// llama.cpp's C library driven as `llama-bench -o json` drives it, or for its logits. Built by tests/device_tools.py for x86-64
// and for arm64, against whichever libllama is at hand:
//
//     driver -m FILE -t THREADS -r REPEATS -ngl 0 -o json -p 8,16 -n 0 [-d 0]     llama-bench's JSON, of the keys that are read
//     driver --logits FILE THREADS ID ID ...     float32 logits of every position on stdout; BACKEND=libggml-cpu-....so chooses kernels
//
// Both parameter structs are only handed on from the function that fills them to the one that takes them, so their layout does not
// matter: the platforms' calling conventions pass a struct of this size by address or on the stack, and a larger one as well.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct { char bytes[1024]; } params;
typedef struct { int32_t n; int32_t *token; float *embd; int32_t *pos; int32_t *n_seq; int32_t **seq; int8_t *logits; } batch;
void llama_backend_init(void);
void llama_log_set(void (*callback)(int, const char *, void *), void *data);
params llama_model_default_params(void);
params llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, params p);
void *llama_init_from_model(void *model, params p);
const void *llama_model_get_vocab(const void *model);
int32_t llama_vocab_n_tokens(const void *vocab);
void llama_set_n_threads(void *context, int32_t n, int32_t n_batch);
void *llama_get_memory(void *context);
void llama_memory_clear(void *memory, _Bool data);
batch llama_batch_init(int32_t n, int32_t embd, int32_t n_seq);
int32_t llama_decode(void *context, batch b);
float *llama_get_logits_ith(void *context, int32_t i);
void ggml_backend_load_all_from_path(const char *folder);
void *ggml_backend_load(const char *path);

static void quiet(int level, const char *text, void *data) { (void)data; if (level >= 3) fputs(text, stderr); }  // warnings and errors
static void die(const char *what) { fprintf(stderr, "error: %s\n", what); exit(1); }
static long long now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000LL + t.tv_nsec; }

static void *context, *model;

static void load(const char *path, int threads) {
    const char *backend = getenv("BACKEND");
    llama_log_set(quiet, NULL);
    if (backend) { if (!ggml_backend_load(backend)) die("this backend cannot be loaded"); }
    else { char self[4096]; ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1); if (n > 0) { self[n] = 0; *strrchr(self, '/') = 0; ggml_backend_load_all_from_path(self); } }
    llama_backend_init();
    if (!(model = llama_model_load_from_file(path, llama_model_default_params()))) die("failed to load model");
    if (!(context = llama_init_from_model(model, llama_context_default_params()))) die("failed to create context");
    llama_set_n_threads(context, threads, threads);
}

static void decode(const int *ids, int n, int at, int all) {
    batch b = llama_batch_init(n, 0, 1);
    for (int i = 0; i < n; i++) { b.token[i] = ids[i]; b.pos[i] = at + i; b.n_seq[i] = 1; b.seq[i][0] = 0; b.logits[i] = all || i == n - 1; }
    b.n = n;
    if (llama_decode(context, b)) die("failed to decode");
}

static long long reading(int n, int vocab, int at) {
    int ids[512];
    if (n > 512) die("prompt too long");
    for (int i = 0; i < n; i++) ids[i] = (7919 * (i + 1)) % vocab;
    long long start = now();
    if (n) decode(ids, n, at, 0);
    return now() - start;
}

static long long writing(int n, int vocab, int at) {
    long long start = now();
    for (int i = 0, id = 1; i < n; i++) { decode(&id, 1, at + i, 0); id = (7919 * (i + 2)) % vocab; }
    return now() - start;
}

static int list(char *text, int *values) {
    int n = 0;
    for (char *word = strtok(text, ","); word && n < 16; word = strtok(NULL, ",")) values[n++] = atoi(word);
    return n;
}

static int bench(int argc, char **argv) {
    const char *path = "";
    int threads = 1, repeats = 5, prompts[16] = {0}, n_prompts = 1, gen = 0, depths[16] = {0}, n_depths = 1, tests = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "-m")) path = argv[i + 1];
        else if (!strcmp(argv[i], "-t")) threads = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "-r")) repeats = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "-p")) n_prompts = list(argv[i + 1], prompts);
        else if (!strcmp(argv[i], "-n")) gen = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "-d")) n_depths = list(argv[i + 1], depths);
        else if (strcmp(argv[i], "-ngl") && strcmp(argv[i], "-o")) die(argv[i]);
    }
    load(path, threads);
    int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (int p = 0; p < n_prompts; p++)
        for (int d = 0; d < n_depths; d++) {
            printf("%s  {\"build_commit\": \"driver\", \"build_number\": 0, \"backends\": \"CPU\", \"n_threads\": %d, \"n_prompt\": %d, \"n_gen\": %d, "
                   "\"n_depth\": %d, \"samples_ns\": [", tests++ ? ",\n" : "[\n", threads, prompts[p], gen, depths[d]);
            for (int r = 0; r <= repeats; r++) {  // the first is to warm up
                llama_memory_clear(llama_get_memory(context), 0);
                reading(depths[d], vocab, 0);
                long long ns = reading(prompts[p], vocab, depths[d]) + writing(gen, vocab, depths[d] + prompts[p]);
                if (r) printf("%s%lld", r > 1 ? ", " : "", ns);
            }
            printf("]}");
        }
    puts("\n]");
    return 0;
}

static int logits(int argc, char **argv) {
    int ids[512] = {0}, n = 0;
    for (int i = 4; i < argc && n < 512; i++) ids[n++] = atoi(argv[i]);
    load(argv[2], atoi(argv[3]));
    int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    decode(ids, n, 0, 1);
    for (int i = 0; i < n; i++) fwrite(llama_get_logits_ith(context, i), sizeof(float), vocab, stdout);
    return 0;
}

int main(int argc, char **argv) {
    return argc > 4 && !strcmp(argv[1], "--logits") ? logits(argc, argv) : bench(argc, argv);
}
