// Linked before the kernels; see machine.cpp.
__thread char simt_shared_begin[64] = {};
