// What Python calls; each takes one structure of kernels/cpu/arguments.py.
extern "C" {

void kvtuner_store(const Store* args) { store(*args); }

void kvtuner_gather(const Gather* args) { gather(*args); }

void kvtuner_attend(const Attend* args) { attend(*args); }
}
