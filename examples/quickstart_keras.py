import keras

import twinfuse.keras as tfk

model = keras.Sequential([keras.layers.Dense(128, activation="relu"), keras.layers.Dense(10)])
model.build((None, 64))
model = tfk.fuse(model)  # Dense with relu becomes one kernel; the weights stay
model.compile("adam", "mse")
model.fit(keras.random.normal((256, 64)), keras.random.normal((256, 10)))  # backward fused too
print(tfk.explain(model))
