import torch

import twinfuse.torch as tft

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
model = tft.fuse(model)  # Linear and ReLU become one kernel; the weights stay
inputs = torch.randn(32, 64)
loss = model(inputs).logsumexp(1).mean()
loss.backward()  # fused as well
print(tft.explain(model))
